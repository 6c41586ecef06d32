#include "launcher/bench_kernels.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <span>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/status.h"
#include "kernels/cpu/limits.h"
#include "kernels/kernels.h"
#include "launcher/device_bench.h"
#include "launcher/matmul_case.h"
#include "launcher/world.h"

namespace ternion::launcher {
namespace {

using kernels::Executor;
using kernels::QuantizedBuffer;
using kernels::QuantizedRows;
using kernels::TernaryGroup;
using kernels::TernaryLayout;
using kernels::TernaryMatrix;

constexpr int64_t kMaxWeightBytes = int64_t{2} << 30;
constexpr double kSecondsPerCase = 0.4;
constexpr int64_t kSparseTokens[] = {1, 2, 4, 8, 16, 32};
constexpr int kMinRepetitions = 5;
constexpr double kLimitSeconds = 0.01;  // that measuring the limits takes, about
constexpr int kMaxLimitSamples = 40;    // per case
constexpr int64_t kReadSliceBytes = int64_t{128} << 20;

// Some tokens through `num_experts` matrices of which only some lines are alive, for each token by
// itself: outputs that are wanted (kRows: up) or inputs that are not 0 (kColumns: down). Beside the
// same matrices in panels.
struct SparseCase {
  TernaryLayout layout;
  int64_t outputs;
  int64_t inputs;
  int num_experts;
  double live;
  int64_t tokens = 1;

  bool by_rows() const { return layout == TernaryLayout::kRows; }
};

struct SparseResult {
  double seconds = 0;
  double speedup = 0;            // over panels
  double of_read_bandwidth = 0;  // by the bytes of lines that are alive for some token
};

struct Limits {
  double bytes_per_second = 0;
  double macs_per_second = 0;
};

struct Result {
  double macs_per_second = 0;
  double bytes_per_second = 0;   // of weights
  Limits limits;                 // while this case ran
  double of_read_bandwidth = 0;  // fractions of the limits
  double of_dot_peak = 0;
};

std::string CpuName() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown CPU";
}

int64_t WeightBufferBytes() {
  const int64_t free_bytes = sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
  return std::min(kMaxWeightBytes, free_bytes / 4);
}

class Bench {
 public:
  Bench(const kernels::Kernels& table, int num_threads)
      : table_(table),
        threads_(num_threads, base::AllowedCpus()),
        weights_(WeightBufferBytes()),
        rng_(1) {
    FillWeights();
  }

  int num_threads() const { return threads_.num_threads(); }

  Result Run(const MatmulCase& c);
  SparseResult Run(const SparseCase& c);

 private:
  int64_t FillSparse(const SparseCase& c, const QuantizedRows& x, std::span<float> gate);
  void FillWeights();
  Limits MeasureLimits();
  void ShuffleWeights(int64_t matrix_bytes);
  const uint8_t* NextWeights(int64_t matrix_bytes);
  std::vector<TernaryGroup> NextGroups(const MatmulCase& c, float* y);
  double SecondsOf(const kernels::TernaryMatmulArgs& args);

  const kernels::Kernels& table_;
  base::ThreadPool threads_;
  base::Buffer weights_;
  std::mt19937_64 rng_;
  std::vector<int64_t> order_;  // in which the matrices of the buffer are used
  size_t next_ = 0;
  size_t next_slice_ = 0;  // of the buffer, for the read bandwidth
};

void Bench::FillWeights() {
  const int64_t words = static_cast<int64_t>(weights_.size()) / 8;
  threads_.ParallelFor(words, 1, [&](int64_t begin, int64_t end, int) {
    uint64_t* all = reinterpret_cast<uint64_t*>(weights_.data());
    FillWithCodes({all + begin, all + end}, begin);
  });
}

// One measurement of each limit, a few milliseconds long.
Limits Bench::MeasureLimits() {
  const size_t bytes = std::min<size_t>(kReadSliceBytes, weights_.size());
  const size_t slice = next_slice_++ % (weights_.size() / bytes);
  return {kernels::ReadBandwidth({weights_.data() + slice * bytes, bytes}, threads_),
          kernels::DotPeak(table_.name, threads_)};
}

void Bench::ShuffleWeights(int64_t matrix_bytes) {
  order_.resize(static_cast<int64_t>(weights_.size()) / matrix_bytes);
  std::iota(order_.begin(), order_.end(), 0);
  std::shuffle(order_.begin(), order_.end(), rng_);
}

// The weights not used for longest.
const uint8_t* Bench::NextWeights(int64_t matrix_bytes) {
  return weights_.data() + order_[next_++ % order_.size()] * matrix_bytes;
}

double Bench::SecondsOf(const kernels::TernaryMatmulArgs& args) {
  Executor executor{.threads = &threads_};
  threads_.Run([](int) {});  // awake, as they are between two ops of one step
  const auto start = std::chrono::steady_clock::now();
  table_.ternary_matmul(args, executor);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double>& v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}

// One group per expert that has rows.
std::vector<TernaryGroup> Bench::NextGroups(const MatmulCase& c, float* y) {
  const int64_t bytes = kernels::TernaryBytes(c.outputs, c.inputs);
  std::vector<TernaryGroup> groups;
  int64_t row = 0;
  for (int64_t count : RandomRowsPerExpert(c, rng_)) {
    if (count == 0) continue;
    groups.push_back({{NextWeights(bytes), 1.0f, c.outputs, c.inputs},
                      row,
                      count,
                      y + row * c.outputs,
                      c.outputs});
    row += count;
  }
  return groups;
}

// Medians over repetitions, each with weights that are in no cache and routing of its own. Clock
// rates and neighbours change from second to second: limits are measured between repetitions, and a
// fraction is the median of each repetition over the limit measured just before it.
Result Bench::Run(const MatmulCase& c) {
  ShuffleWeights(kernels::TernaryBytes(c.outputs, c.inputs));

  QuantizedBuffer activations(c.rows(), c.inputs);
  const QuantizedRows x = activations.rows(c.rows());
  for (int64_t i = 0; i < x.num_rows * x.stride; ++i) x.codes[i] = static_cast<int8_t>(rng_());
  base::Array<float> y(c.rows() * c.outputs);

  Result result;
  std::vector<double> seconds, bytes, read_limits, dot_limits, of_read, of_dot;
  const double macs = static_cast<double>(c.products());
  double total = 0;
  while (total < kSecondsPerCase || seconds.size() < kMinRepetitions) {
    const bool with_limits = seconds.size() < kMaxLimitSamples;
    const Limits limits = with_limits ? MeasureLimits() : Limits();
    const std::vector<TernaryGroup> groups = NextGroups(c, y.data());
    const double took = SecondsOf({x, groups});
    seconds.push_back(took);
    bytes.push_back(
        static_cast<double>(groups.size() * kernels::TernaryBytes(c.outputs, c.inputs)) / took);
    total += took;
    if (!with_limits) continue;
    read_limits.push_back(limits.bytes_per_second);
    dot_limits.push_back(limits.macs_per_second);
    of_read.push_back(bytes.back() / limits.bytes_per_second);
    if (limits.macs_per_second > 0) of_dot.push_back(macs / took / limits.macs_per_second);
  }
  result.macs_per_second = macs / Median(seconds);
  result.bytes_per_second = Median(bytes);
  result.limits = {Median(read_limits), Median(dot_limits)};
  result.of_read_bandwidth = Median(of_read);
  if (!of_dot.empty()) result.of_dot_peak = Median(of_dot);  // scalar has no peak
  return result;
}

// Fills activations and gate with random live lines; returns how many are alive for some token.
int64_t Bench::FillSparse(const SparseCase& c, const QuantizedRows& x, std::span<float> gate) {
  std::vector<bool> alive(c.by_rows() ? c.outputs : c.inputs);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.inputs; ++i) {
      x.codes[t * x.stride + i] = static_cast<int8_t>(rng_() | 1);
    }
    std::fill_n(gate.data() + t * c.outputs, c.outputs, 1.0f);
    for (size_t i = 0; i < alive.size(); ++i) {
      if (static_cast<double>(rng_() >> 11) < c.live * 0x1p53) {
        alive[i] = true;
      } else if (c.by_rows()) {
        gate[t * c.outputs + i] = -1.0f;
      } else {
        x.codes[t * x.stride + i] = 0;
      }
    }
  }
  return std::count(alive.begin(), alive.end(), true);
}

// Each repetition runs the same live lines in panels and in lines, with weights that are in no
// cache.
SparseResult Bench::Run(const SparseCase& c) {
  const int64_t panel_bytes = kernels::TernaryBytes(c.outputs, c.inputs);
  const int64_t line_bytes = kernels::TernaryBytes(c.outputs, c.inputs, c.layout);
  ShuffleWeights(std::max(panel_bytes, line_bytes));

  QuantizedBuffer activations(c.tokens, c.inputs);
  const QuantizedRows x = activations.rows(c.tokens);
  base::Array<float> gate(c.tokens * c.outputs), y(c.tokens * c.outputs * c.num_experts);
  std::vector<double> seconds, speedups, of_read;
  double total = 0;
  while (total < kSecondsPerCase || seconds.size() < kMinRepetitions) {
    const int64_t num_live = FillSparse(c, x, gate.span());
    std::vector<TernaryGroup> dense, sparse;
    for (int e = 0; e < c.num_experts; ++e) {
      float* const out = y.data() + e * c.tokens * c.outputs;
      dense.push_back(
          {{NextWeights(panel_bytes), 1.0f, c.outputs, c.inputs}, 0, c.tokens, out, c.outputs});
      sparse.push_back({{NextWeights(line_bytes), 1.0f, c.outputs, c.inputs, c.layout},
                        0,
                        c.tokens,
                        out,
                        c.outputs,
                        c.by_rows() ? gate.data() : nullptr});
    }
    const Limits limits = MeasureLimits();
    const double dense_seconds = SecondsOf({x, dense});
    seconds.push_back(SecondsOf({x, sparse}));
    speedups.push_back(dense_seconds / seconds.back());
    const int64_t stride = sparse[0].weights.stride_bytes();
    of_read.push_back(static_cast<double>(num_live * stride * c.num_experts) / seconds.back() /
                      limits.bytes_per_second);
    total += dense_seconds + seconds.back() + kLimitSeconds;
  }
  return {Median(seconds), Median(speedups), Median(of_read)};
}

std::vector<SparseCase> SparseCases() {
  std::vector<SparseCase> cases;
  for (double live : {1.0, 0.5, 0.29, 0.16}) {
    cases.push_back({TernaryLayout::kRows, 14336, 4096, 1, live});
    cases.push_back({TernaryLayout::kColumns, 4096, 14336, 1, live});
    cases.push_back({TernaryLayout::kColumns, 2048, 768, 8, live});
    cases.push_back({TernaryLayout::kRows, 256, 256, 8, live});
    cases.push_back({TernaryLayout::kColumns, 256, 256, 8, live});
  }
  std::stable_sort(cases.begin(), cases.end(), [](const SparseCase& a, const SparseCase& b) {
    return std::tuple(-a.outputs * a.inputs, a.layout) <
           std::tuple(-b.outputs * b.inputs, b.layout);
  });
  return cases;
}

std::vector<MatmulCase> Cases() {
  std::vector<MatmulCase> cases;
  for (int64_t rows : {1, 2, 4, 8, 16, 32, 128, 512}) cases.push_back({4096, 14336, rows});
  for (int64_t tokens : {1, 4, 16, 32, 128, 512}) cases.push_back({768, 2048, tokens, 128, 8});
  return cases;
}

void PrintResult(const MatmulCase& c, const Result& result) {
  absl::PrintF("%-28s %6d %9.1f %9.1f %7.1f%% %7.1f%%\n", c.Name(), c.tokens,
               result.macs_per_second * 1e-9, result.bytes_per_second * 1e-9,
               100 * result.of_read_bandwidth, 100 * result.of_dot_peak);
}

nlohmann::json ToJson(const MatmulCase& c, const Result& result) {
  return {{"outputs", c.outputs},
          {"inputs", c.inputs},
          {"tokens", c.tokens},
          {"experts", c.num_experts},
          {"top_k", c.top_k},
          {"gmac_per_s", result.macs_per_second * 1e-9},
          {"weight_gb_per_s", result.bytes_per_second * 1e-9},
          {"percent_of_read_bandwidth", 100 * result.of_read_bandwidth},
          {"percent_of_dot_peak", 100 * result.of_dot_peak}};
}

void PrintName(const SparseCase& c) {
  std::string shape = absl::StrCat(c.outputs, " x ", c.inputs);
  if (c.num_experts > 1) absl::StrAppend(&shape, ", ", c.num_experts, " of them");
  absl::PrintF("%-28s %-7s %5.0f%%", shape, c.by_rows() ? "rows" : "columns", 100 * c.live);
}

nlohmann::json ToJson(const SparseCase& c, const SparseResult& result) {
  return {{"layout", c.by_rows() ? "rows" : "columns"},
          {"outputs", c.outputs},
          {"inputs", c.inputs},
          {"tokens", c.tokens},
          {"experts", c.num_experts},
          {"live", c.live},
          {"us", result.seconds * 1e6},
          {"speedup_over_panels", result.speedup},
          {"percent_of_read_bandwidth", 100 * result.of_read_bandwidth}};
}

}  // namespace

absl::Status BenchKernels(const BenchKernelsOptions& options) {
  if (options.device == "cuda") return BenchDeviceKernels(options.cublas, options.json_path);
  TERNION_ASSIGN_OR_RETURN(const kernels::Kernels* const table, ChooseCpuKernels());
  const int all_cpus = static_cast<int>(base::AllowedCpus().size());
  Bench bench(*table, options.num_threads > 0 ? options.num_threads : std::max(all_cpus, 1));
  absl::PrintF("%s, %s, %d threads\n", CpuName(), table->name, bench.num_threads());

  absl::PrintF("%-28s %6s %9s %9s %8s %8s\n", "ternary matmul", "tokens", "GMAC/s", "GB/s",
               "of read", "of dot");
  Limits best;
  nlohmann::json lines = nlohmann::json::array();
  for (const MatmulCase& c : Cases()) {
    const Result result = bench.Run(c);
    PrintResult(c, result);
    std::fflush(stdout);
    lines.push_back(ToJson(c, result));
    best.bytes_per_second = std::max(best.bytes_per_second, result.limits.bytes_per_second);
    best.macs_per_second = std::max(best.macs_per_second, result.limits.macs_per_second);
  }
  absl::PrintF("\n%-28s %-7s %6s", "live lines only, over panels", "lines", "live");
  for (int64_t tokens : kSparseTokens) absl::PrintF(" %4d tok", tokens);
  absl::PrintF("\n");
  nlohmann::json sparse_lines = nlohmann::json::array();
  for (SparseCase c : SparseCases()) {
    PrintName(c);
    for (int64_t tokens : kSparseTokens) {
      c.tokens = tokens;
      const SparseResult result = bench.Run(c);
      absl::PrintF(" %7.2fx", result.speedup);
      std::fflush(stdout);
      sparse_lines.push_back(ToJson(c, result));
    }
    absl::PrintF("\n");
  }
  absl::PrintF("limits at best: read %.1f GB/s, 8-bit dot products %.1f GMAC/s\n",
               best.bytes_per_second * 1e-9, best.macs_per_second * 1e-9);
  if (options.json_path.empty()) return absl::OkStatus();
  const nlohmann::json report = {{"cpu", CpuName()},
                                 {"isa", table->name},
                                 {"threads", bench.num_threads()},
                                 {"read_gb_per_s", best.bytes_per_second * 1e-9},
                                 {"dot_gmac_per_s", best.macs_per_second * 1e-9},
                                 {"ternary_matmul", lines},
                                 {"sparse_ternary_matmul", sparse_lines}};
  return base::WriteFileAtomically(options.json_path, report.dump(2) + "\n");
}

}  // namespace ternion::launcher
