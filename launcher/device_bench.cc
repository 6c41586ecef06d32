#include "launcher/device_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/logging.h"
#include "base/status.h"
#include "comm/finish.h"
#include "kernels/cuda/limits.h"
#include "kernels/select.h"

namespace ternion::launcher {
namespace {

using kernels::ExpertMatrices;
using kernels::QuantizedRows;
using kernels::TernaryLayout;
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

// How many calls, of so many bytes of weights each, make up a recording.
absl::StatusOr<int64_t> CallsOfRecording(const MatmulCase& c, int64_t bytes_of_call,
                                         int64_t weight_bytes) {
  if (bytes_of_call > weight_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        c.Name(), ": ", bytes_of_call, " bytes of weights, and room for ", weight_bytes));
  }
  return std::clamp<int64_t>(std::min(kBytesPerRecording, weight_bytes) / bytes_of_call, 1,
                             kMaxCalls);
}

}  // namespace

ColdWeights::ColdWeights(int64_t bytes, Fill fill, base::Memory& memory) : data_(bytes, memory) {
  std::vector<uint64_t> piece((1 << 23) - 1);  // odd, so that rows of matrices do not repeat
  fill(piece, 1);
  const size_t piece_bytes = piece.size() * sizeof(uint64_t);
  for (size_t at = 0; at < data_.size(); at += piece_bytes) {
    memory.Write(piece.data(), std::min(piece_bytes, data_.size() - at), data_.data() + at);
  }
}

// What was not used for longest.
uint8_t* ColdWeights::Next(int64_t bytes) {
  if (next_ + bytes > size()) next_ = 0;
  next_ += bytes;
  return data_.data() + next_ - bytes;
}

// What the calls of a recording read and write, in the executor's memory.
struct DeviceBench::Operands {
  Operands(const MatmulCase& c, TernaryLayout in_layout, int64_t num_calls, base::Memory& memory)
      : layout(in_layout),
        x(c.rows(), c.inputs, memory),
        y(c.rows() * c.outputs, memory),
        matrices(num_calls * c.num_experts),
        begin(num_calls * (c.num_experts + 1)),
        used(num_calls * c.num_experts) {
    std::fill_n(used.data(), used.size(), -1);
  }

  const TernaryLayout layout;
  kernels::QuantizedBuffer x;
  base::Array<float> y;
  base::Array<TernaryMatrix> matrices;  // [calls, experts]
  base::Array<int32_t> begin;           // [calls, experts + 1]
  base::Array<int32_t> used;            // [calls, experts]
  int64_t used_matrices = 0;            // over all calls, those of experts with rows
};

DeviceBench::DeviceBench(const kernels::Kernels& kernels, kernels::Executor& executor,
                         int64_t weight_bytes)
    : kernels_(kernels),
      executor_(executor),
      weights_(weight_bytes, FillWithCodes, *executor.memory) {}

// In base 3 any byte is five codes, so that the memory that holds codes of two bits will do.
TernaryMatrix DeviceBench::NextMatrix(const MatmulCase& c, TernaryLayout layout) {
  const int64_t bytes = kernels::TernaryBytes(c.outputs, c.inputs, layout);
  return {weights_.Next(bytes), 1.0f, c.outputs, c.inputs, layout};
}

void DeviceBench::Call(const MatmulCase& c, Operands& operands, int64_t call) {
  const QuantizedRows x = operands.x.rows(c.rows());
  if (c.num_experts == 1) {
    const kernels::TernaryGroup groups[] = {
        {NextMatrix(c, operands.layout), 0, c.rows(), operands.y.data(), c.outputs}};
    return kernels_.ternary_matmul({x, groups}, executor_);
  }
  const ExpertMatrices experts = {operands.matrices.data() + call * c.num_experts,
                                  operands.y.data()};
  kernels_.expert_matmul({.x = x,
                          .matrices = {experts},
                          .num_routes = c.rows(),
                          .begin = operands.begin.data() + call * (c.num_experts + 1),
                          .used = operands.used.data() + call * c.num_experts,
                          .rows = c.outputs,
                          .num_experts = c.num_experts,
                          .layout = operands.layout},
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

// Of one of `calls` calls that are recorded together.
absl::StatusOr<double> DeviceBench::SecondsOfEach(int64_t calls,
                                                  const std::function<void(int64_t)>& call) {
  const kernels::Recording recording = kernels_.record(
      [&] {
        for (int64_t i = 0; i < calls; ++i) call(i);
      },
      executor_);
  if (recording == nullptr) return absl::InternalError("the device did not record the products");
  TERNION_ASSIGN_OR_RETURN(const double seconds, SecondsOf(recording));
  return seconds / static_cast<double>(calls);
}

absl::StatusOr<DeviceBench::Result> DeviceBench::Run(const MatmulCase& c, TernaryLayout layout) {
  const int64_t matrix_bytes = kernels::TernaryBytes(c.outputs, c.inputs, layout);
  // Experts without rows are not read: calls enough that those with rows are in no cache.
  const int64_t most_used = std::min<int64_t>(c.rows(), c.num_experts);
  TERNION_ASSIGN_OR_RETURN(const int64_t calls,
                           CallsOfRecording(c, matrix_bytes * most_used, weights_.size()));
  Operands operands(c, layout, calls, *executor_.memory);
  for (int64_t call = 0; call < calls; ++call) {
    const std::vector<int64_t> rows = RandomRowsPerExpert(c, rng_);
    int32_t* begin = operands.begin.data() + call * (c.num_experts + 1);
    int32_t* used = operands.used.data() + call * c.num_experts;
    for (int e = 0; e < c.num_experts; ++e) {
      begin[e + 1] = begin[e] + static_cast<int32_t>(rows[e]);
      operands.used_matrices += rows[e] > 0;
      if (rows[e] > 0) *used++ = e;
      if (c.num_experts > 1) operands.matrices[call * c.num_experts + e] = NextMatrix(c, layout);
    }
  }
  operands.begin.MoveTo(*executor_.memory);
  operands.used.MoveTo(*executor_.memory);
  operands.matrices.MoveTo(*executor_.memory);
  const QuantizedRows x = operands.x.rows(c.rows());
  std::vector<uint64_t> codes(base::CeilDiv(x.num_rows * x.stride, int64_t{8}));
  for (uint64_t& word : codes) word = rng_();
  executor_.memory->Write(codes.data(), x.num_rows * x.stride, x.codes);

  TERNION_ASSIGN_OR_RETURN(const double seconds,
                           SecondsOfEach(calls, [&](int64_t call) { Call(c, operands, call); }));
  const double used = static_cast<double>(operands.used_matrices) / static_cast<double>(calls);
  return Result{seconds, used * static_cast<double>(matrix_bytes) / seconds,
                static_cast<double>(c.products()) / seconds};
}

absl::StatusOr<double> DeviceBench::RunCublas(const MatmulCase& c, kernels::Cublas& cublas) {
  base::Memory& memory = *executor_.memory;
  if (bf16_weights_.size() == 0) {
    bf16_weights_ = ColdWeights(weights_.size(), FillWithBf16, memory);
  }
  const int64_t matrix_bytes = c.outputs * c.inputs * static_cast<int64_t>(sizeof(uint16_t));
  TERNION_ASSIGN_OR_RETURN(const int64_t calls,
                           CallsOfRecording(c, matrix_bytes, bf16_weights_.size()));
  std::vector<uint64_t> numbers(base::CeilDiv(c.rows() * c.inputs, int64_t{4}));
  FillWithBf16(numbers, 2);
  base::Array<uint16_t> x(numbers.size() * 4, memory), y(c.rows() * c.outputs, memory);
  memory.Write(numbers.data(), numbers.size() * sizeof(uint64_t), x.data());
  const char* error = nullptr;
  const auto call = [&](int64_t) {
    const char* refused =
        cublas.Matmul({.x = x.data(),
                       .weights = reinterpret_cast<uint16_t*>(bf16_weights_.Next(matrix_bytes)),
                       .y = y.data(),
                       .num_rows = static_cast<int>(c.rows()),
                       .outputs = static_cast<int>(c.outputs),
                       .inputs = static_cast<int>(c.inputs)});
    if (refused != nullptr) error = refused;
  };
  call(0);
  TERNION_RETURN_IF_ERROR(comm::Finish(kernels_, executor_));
  if (error != nullptr) return absl::InternalError(error);
  absl::StatusOr<double> seconds = SecondsOfEach(calls, call);
  if (error != nullptr) return absl::InternalError(error);
  return seconds;
}

namespace {

struct Case {
  MatmulCase product;
  TernaryLayout layout;

  bool base3() const { return layout == TernaryLayout::kTilesBase3; }
};

std::vector<Case> Cases() {
  const TernaryLayout two_bits = TernaryLayout::kTiles, base3 = TernaryLayout::kTilesBase3;
  std::vector<Case> cases;
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
    cases.push_back({{outputs, inputs, 1}, two_bits});
  }
  for (int64_t rows : {2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048}) {
    cases.push_back({{4096, 14336, rows}, two_bits});
  }
  for (int64_t tokens : {1, 4, 16, 64, 256, 1024, 4096}) {
    cases.push_back({{768, 2048, tokens, 128, 8}, two_bits});
  }
  for (int64_t rows : {1, 8, 64, 1024}) cases.push_back({{4096, 14336, rows}, base3});
  for (int64_t tokens : {1, 8, 32, 128}) {  // DeepSeek-V3's experts
    cases.push_back({{2048, 7168, tokens, 256, 8}, two_bits});
    cases.push_back({{2048, 7168, tokens, 256, 8}, base3});
  }
  return cases;
}

// A product of ours and cuBLAS's beside it, of which there is none for experts, without cuBLAS and
// where that fails.
struct Line {
  Case of;
  DeviceBench::Result result;
  std::optional<double> cublas_seconds;
};

absl::StatusOr<Line> Measure(const Case& of, DeviceBench& bench, kernels::Cublas* cublas) {
  const MatmulCase& c = of.product;
  Line line;
  line.of = of;
  TERNION_ASSIGN_OR_RETURN(line.result, bench.Run(c, of.layout));
  if (cublas == nullptr || c.num_experts > 1) return line;
  const absl::StatusOr<double> seconds = bench.RunCublas(c, *cublas);
  if (seconds.ok()) {
    line.cublas_seconds = *seconds;
  } else {
    spdlog::warn("{}, cuBLAS: {}", c.Name(), std::string(seconds.status().message()));
  }
  return line;
}

nlohmann::json ToJson(const Line& line, const kernels::DeviceLimits& limits) {
  const auto& [of, result, cublas] = line;
  const MatmulCase& c = of.product;
  using Json = nlohmann::json;
  return {
      {"outputs", c.outputs},
      {"inputs", c.inputs},
      {"tokens", c.tokens},
      {"experts", c.num_experts},
      {"top_k", c.top_k},
      {"bits_per_weight", of.base3() ? 1.625 : 2.0},
      {"us", result.seconds * 1e6},
      {"gmac_per_s", result.macs_per_second * 1e-9},
      {"weight_gb_per_s", result.bytes_per_second * 1e-9},
      {"percent_of_copy_bandwidth", 100 * result.bytes_per_second / limits.copied_bytes_per_second},
      {"percent_of_matrix_rate", 100 * result.macs_per_second / limits.macs_per_second},
      {"cublas_bf16_us", cublas ? Json(*cublas * 1e6) : Json()},
      {"speedup_over_cublas_bf16", cublas ? Json(*cublas / result.seconds) : Json()}};
}

void PrintLine(const Line& line, const kernels::DeviceLimits& limits) {
  const auto& [of, result, cublas] = line;
  const MatmulCase& c = of.product;
  absl::PrintF("%-36s %6d %9.2f %9.1f %9.0f %7.1f%% %7.1f%% %11s %8s\n",
               c.Name() + (of.base3() ? ", base 3" : ""), c.tokens, result.seconds * 1e6,
               result.macs_per_second * 1e-12, result.bytes_per_second * 1e-9,
               100 * result.bytes_per_second / limits.copied_bytes_per_second,
               100 * result.macs_per_second / limits.macs_per_second,
               cublas ? absl::StrFormat("%.2f", *cublas * 1e6) : "-",
               cublas ? absl::StrFormat("%.2fx", *cublas / result.seconds) : "-");
  std::fflush(stdout);
}

}  // namespace

absl::Status BenchDeviceKernels(const std::string& cublas_file, const std::string& json_path) {
  kernels::Executor executor;
  std::string why;
  const kernels::Kernels* table = kernels::SelectCudaKernels(0, executor, &why);
  if (table == nullptr) return absl::FailedPreconditionError("--device cuda: " + why);
  const std::unique_ptr<kernels::Cublas> cublas = kernels::LoadCublas(cublas_file, executor, &why);
  if (cublas == nullptr && !cublas_file.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("--cublas ", cublas_file, ": ", why));
  }
  const kernels::DeviceLimits limits = kernels::MeasureDeviceLimits(executor);
  TERNION_RETURN_IF_ERROR(comm::Finish(*table, executor));
  absl::PrintF("%s: copies %.0f GB/s (read and written), 8-bit products %.0f TMAC/s\n", limits.name,
               limits.copied_bytes_per_second * 1e-9, limits.macs_per_second * 1e-12);
  absl::PrintF("cuBLAS: %s\n", cublas ? cublas->version() : "absent: " + why);
  absl::PrintF("%-36s %6s %9s %9s %9s %8s %8s %11s %8s\n", "ternary matmul", "tokens", "us",
               "TMAC/s", "GB/s", "of copy", "of rate", "cuBLAS bf16", "faster");
  DeviceBench bench(*table, executor,
                    std::min(kMaxWeightBytes, executor.memory->capacity_bytes() / 4));
  nlohmann::json lines = nlohmann::json::array();
  for (const Case& c : Cases()) {
    TERNION_ASSIGN_OR_RETURN(const Line line, Measure(c, bench, cublas.get()));
    lines.push_back(ToJson(line, limits));
    PrintLine(line, limits);
  }
  if (json_path.empty()) return absl::OkStatus();
  const nlohmann::json report = {
      {"device", limits.name},
      {"copied_gb_per_s", limits.copied_bytes_per_second * 1e-9},
      {"gmac_per_s", limits.macs_per_second * 1e-9},
      {"cublas", cublas ? nlohmann::json(cublas->version()) : nlohmann::json()},
      {"ternary_matmul", lines}};
  return base::WriteFileAtomically(json_path, report.dump(2) + "\n");
}

}  // namespace ternion::launcher
