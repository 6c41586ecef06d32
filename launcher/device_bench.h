// `ternion bench kernels --device cuda`: the ternary products of a device against what it can do.
#pragma once

#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/buffer.h"
#include "kernels/cuda/cublas.h"
#include "kernels/kernels.h"
#include "launcher/matmul_case.h"

namespace ternion::launcher {

// Prints a table: matrices of well-known models times one row (cold weights), then times more and
// more rows, then experts, some also in base 3. Percentages are of the device's copy bandwidth,
// bytes read and written together, and of the rate of its 8-bit matrix instructions, both measured
// now. Beside products of one matrix stand cuBLAS's of bf16 numbers, if there is a cuBLAS: the file
// `cublas`, or what LoadCublas finds. With `json_path`, writes the same as one JSON object
// (docs/json.md). Takes about a minute. FailedPrecondition without a device or without the file
// that was named.
absl::Status BenchDeviceKernels(const std::string& cublas, const std::string& json_path);

// Random weights in the executor's memory, handed out in turn: a matrix that comes again is in no
// cache, if there are several times as many bytes as those hold.
class ColdWeights {
 public:
  using Fill = void (*)(std::span<uint64_t> words, uint64_t seed);

  ColdWeights() = default;
  ColdWeights(int64_t bytes, Fill fill, base::Memory& memory);
  uint8_t* Next(int64_t bytes);  // at most size()
  int64_t size() const { return static_cast<int64_t>(data_.size()); }

 private:
  base::Buffer data_;
  int64_t next_ = 0;
};

// Measures products on the device behind a table whose ops can be recorded.
class DeviceBench {
 public:
  struct Result {
    double seconds = 0;           // of one product
    double bytes_per_second = 0;  // of weights, those of experts without rows left out
    double macs_per_second = 0;
  };

  // Takes `weight_bytes` of the executor's memory for weights, and as many for cuBLAS's. Both
  // outlive it.
  DeviceBench(const kernels::Kernels& kernels, kernels::Executor& executor, int64_t weight_bytes);

  // The median over repetitions of a recording of many products, each with weights that are in no
  // cache (if the weights are several times as large as those) and routing of its own.
  // ResourceExhausted when one product needs more weights than there are; Internal when the device
  // failed.
  absl::StatusOr<Result> Run(const MatmulCase& c, kernels::TernaryLayout layout);

  // Seconds of one product by cuBLAS, of one matrix at bf16, measured in the same way. Also
  // Internal when cuBLAS refuses.
  absl::StatusOr<double> RunCublas(const MatmulCase& c, kernels::Cublas& cublas);

 private:
  struct Operands;
  absl::StatusOr<double> SecondsOfEach(int64_t calls, const std::function<void(int64_t)>& call);
  absl::StatusOr<double> SecondsOf(const kernels::Recording& recording);
  kernels::TernaryMatrix NextMatrix(const MatmulCase& c, kernels::TernaryLayout layout);
  void Call(const MatmulCase& c, Operands& operands, int64_t call);

  const kernels::Kernels& kernels_;
  kernels::Executor& executor_;
  ColdWeights weights_;
  ColdWeights bf16_weights_;  // empty until cuBLAS runs
  std::mt19937_64 rng_{1};
};

}  // namespace ternion::launcher
