#include "launcher/device_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/finish.h"
#include "kernels/cuda/limits.h"
#include "kernels/select.h"

namespace ternion::launcher {
namespace {

using kernels::QuantizedRows;
using kernels::TernaryMatrix;

constexpr int64_t kMaxWeightBytes = int64_t{4} << 30;
constexpr int64_t kBytesPerRecording = int64_t{1} << 30;  // of weights, more than any cache holds
constexpr int64_t kMaxCalls = 512;                        // in a recording
constexpr double kSecondsPerMeasurement = 0.02;
constexpr int kMeasurements = 7;

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

// What the calls of a recording read and write, in the executor's memory.
struct DeviceBench::Operands {
  Operands(const MatmulCase& c, int num_calls, base::Memory& memory)
      : calls(num_calls),
        x(c.rows(), c.inputs, memory),
        y(c.rows() * c.outputs, memory),
        matrices(int64_t{num_calls} * c.num_experts),
        begin(int64_t{num_calls} * (c.num_experts + 1)) {}

  int calls;
  kernels::QuantizedBuffer x;
  base::Array<float> y;
  base::Array<TernaryMatrix> matrices;  // [calls, experts]
  base::Array<int32_t> begin;           // [calls, experts + 1]
  int64_t used_matrices = 0;            // over all calls, those of experts with rows
};

DeviceBench::DeviceBench(const kernels::Kernels& kernels, kernels::Executor& executor,
                         int64_t weight_bytes)
    : kernels_(kernels), executor_(executor), weights_(weight_bytes, *executor.memory) {
  std::vector<uint64_t> piece((1 << 23) - 1);  // odd, so that rows of matrices do not repeat
  FillWithCodes(piece, 1);
  const size_t piece_bytes = piece.size() * sizeof(uint64_t);
  for (size_t at = 0; at < weights_.size(); at += piece_bytes) {
    executor.memory->Write(piece.data(), std::min(piece_bytes, weights_.size() - at),
                           weights_.data() + at);
  }
}

// The one not used for longest.
TernaryMatrix DeviceBench::NextMatrix(const MatmulCase& c) {
  const size_t bytes = kernels::TernaryBytes(c.outputs, c.inputs, kernels_.layout);
  if (next_ + bytes > weights_.size()) next_ = 0;
  const TernaryMatrix matrix = {weights_.data() + next_, 1.0f, c.outputs, c.inputs,
                                kernels_.layout};
  next_ += bytes;
  return matrix;
}

void DeviceBench::Call(const MatmulCase& c, Operands& operands, int call) {
  const QuantizedRows x = operands.x.rows(c.rows());
  if (c.num_experts == 1) {
    const kernels::TernaryGroup groups[] = {
        {NextMatrix(c), 0, c.rows(), operands.y.data(), c.outputs}};
    return kernels_.ternary_matmul({x, groups}, executor_);
  }
  kernels_.expert_matmul(
      {.x = x,
       .matrices = {{operands.matrices.data() + int64_t{call} * c.num_experts, operands.y.data()}},
       .begin = operands.begin.data() + int64_t{call} * (c.num_experts + 1),
       .rows = c.outputs,
       .num_experts = c.num_experts,
       .layout = kernels_.layout},
      executor_);
}

absl::StatusOr<double> DeviceBench::SecondsOf(const kernels::Recording& recording) {
  int replays = 1;
  for (int warm = 0; warm < 2; ++warm) {  // the second says how long one takes
    const Clock::time_point start = Clock::now();
    kernels_.replay(recording, executor_);
    TERNION_RETURN_IF_ERROR(comm::Finish(kernels_, executor_));
    replays = std::clamp<int>(kSecondsPerMeasurement / SecondsSince(start), 1, 1000);
  }
  std::vector<double> seconds;
  for (int i = 0; i < kMeasurements; ++i) {
    const Clock::time_point start = Clock::now();
    for (int replay = 0; replay < replays; ++replay) kernels_.replay(recording, executor_);
    TERNION_RETURN_IF_ERROR(comm::Finish(kernels_, executor_));
    seconds.push_back(SecondsSince(start) / replays);
  }
  std::nth_element(seconds.begin(), seconds.begin() + kMeasurements / 2, seconds.end());
  return seconds[kMeasurements / 2];
}

absl::StatusOr<DeviceBench::Result> DeviceBench::Run(const MatmulCase& c) {
  const int64_t matrix_bytes = kernels::TernaryBytes(c.outputs, c.inputs, kernels_.layout);
  const int64_t call_bytes = matrix_bytes * c.num_experts;
  if (call_bytes > static_cast<int64_t>(weights_.size())) {
    return absl::ResourceExhaustedError(absl::StrCat(
        c.Name(), ": ", call_bytes, " bytes of weights, and room for ", weights_.size()));
  }
  const int64_t bytes = std::min(kBytesPerRecording, static_cast<int64_t>(weights_.size()));
  const int64_t calls = std::clamp<int64_t>(bytes / call_bytes, 1, kMaxCalls);
  Operands operands(c, static_cast<int>(calls), *executor_.memory);
  for (int64_t call = 0; call < calls; ++call) {
    const std::vector<int64_t> rows = RandomRowsPerExpert(c, rng_);
    int32_t* begin = operands.begin.data() + call * (c.num_experts + 1);
    for (int e = 0; e < c.num_experts; ++e) {
      begin[e + 1] = begin[e] + static_cast<int32_t>(rows[e]);
      operands.used_matrices += rows[e] > 0;
      if (c.num_experts > 1) operands.matrices[call * c.num_experts + e] = NextMatrix(c);
    }
  }
  operands.begin.MoveTo(*executor_.memory);
  operands.matrices.MoveTo(*executor_.memory);
  const QuantizedRows x = operands.x.rows(c.rows());
  std::vector<uint64_t> codes(base::CeilDiv(x.num_rows * x.stride, int64_t{8}));
  for (uint64_t& word : codes) word = rng_();
  executor_.memory->Write(codes.data(), x.num_rows * x.stride, x.codes);

  const kernels::Recording recording = kernels_.record(
      [&] {
        for (int call = 0; call < operands.calls; ++call) Call(c, operands, call);
      },
      executor_);
  if (recording == nullptr) return absl::InternalError("the device did not record the products");
  TERNION_ASSIGN_OR_RETURN(const double all, SecondsOf(recording));
  const double seconds = all / static_cast<double>(calls);
  const double used = static_cast<double>(operands.used_matrices) / static_cast<double>(calls);
  return Result{seconds, used * static_cast<double>(matrix_bytes) / seconds,
                static_cast<double>(c.products()) / seconds};
}

namespace {

std::vector<MatmulCase> Cases() {
  std::vector<MatmulCase> cases;
  // Shapes for which W2A8 kernels publish figures (BitNet's GPU kernels), then those of a 7B.
  for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{2560, 2560},
                                        {3840, 2560},
                                        {13824, 2560},
                                        {2560, 6912},
                                        {3200, 3200},
                                        {4800, 3200},
                                        {3200, 10240},
                                        {20480, 3200},
                                        {4096, 14336}}) {
    cases.push_back({outputs, inputs, 1});
  }
  for (int64_t rows : {2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048}) {
    cases.push_back({4096, 14336, rows});
  }
  for (int64_t tokens : {1, 4, 16, 64, 256, 1024, 4096}) {
    cases.push_back({768, 2048, tokens, 128, 8});
  }
  return cases;
}

nlohmann::json ToJson(const MatmulCase& c, const DeviceBench::Result& result,
                      const kernels::DeviceLimits& limits) {
  return {
      {"outputs", c.outputs},
      {"inputs", c.inputs},
      {"tokens", c.tokens},
      {"experts", c.num_experts},
      {"top_k", c.top_k},
      {"us", result.seconds * 1e6},
      {"gmac_per_s", result.macs_per_second * 1e-9},
      {"weight_gb_per_s", result.bytes_per_second * 1e-9},
      {"percent_of_copy_bandwidth", 100 * result.bytes_per_second / limits.copied_bytes_per_second},
      {"percent_of_matrix_rate", 100 * result.macs_per_second / limits.macs_per_second}};
}

}  // namespace

absl::Status BenchDeviceKernels(const std::string& json_path) {
  kernels::Executor executor;
  std::string why;
  const kernels::Kernels* table = kernels::SelectCudaKernels(0, executor, &why);
  if (table == nullptr) return absl::FailedPreconditionError("--device cuda: " + why);
  const kernels::DeviceLimits limits = kernels::MeasureDeviceLimits(executor);
  TERNION_RETURN_IF_ERROR(comm::Finish(*table, executor));
  absl::PrintF("%s: copies %.0f GB/s (read and written), 8-bit products %.0f TMAC/s\n", limits.name,
               limits.copied_bytes_per_second * 1e-9, limits.macs_per_second * 1e-12);
  absl::PrintF("%-28s %6s %9s %9s %9s %8s %8s\n", "ternary matmul", "tokens", "us", "TMAC/s",
               "GB/s", "of copy", "of rate");
  DeviceBench bench(*table, executor,
                    std::min(kMaxWeightBytes, executor.memory->capacity_bytes() / 4));
  nlohmann::json lines = nlohmann::json::array();
  for (const MatmulCase& c : Cases()) {
    TERNION_ASSIGN_OR_RETURN(const DeviceBench::Result result, bench.Run(c));
    lines.push_back(ToJson(c, result, limits));
    absl::PrintF("%-28s %6d %9.2f %9.1f %9.0f %7.1f%% %7.1f%%\n", c.Name(), c.tokens,
                 result.seconds * 1e6, result.macs_per_second * 1e-12,
                 result.bytes_per_second * 1e-9,
                 100 * result.bytes_per_second / limits.copied_bytes_per_second,
                 100 * result.macs_per_second / limits.macs_per_second);
    std::fflush(stdout);
  }
  if (json_path.empty()) return absl::OkStatus();
  const nlohmann::json report = {{"device", limits.name},
                                 {"copied_gb_per_s", limits.copied_bytes_per_second * 1e-9},
                                 {"gmac_per_s", limits.macs_per_second * 1e-9},
                                 {"ternary_matmul", lines}};
  return base::WriteFileAtomically(json_path, report.dump(2) + "\n");
}

}  // namespace ternion::launcher
