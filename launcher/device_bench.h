// `ternion bench kernels --device cuda`: the ternary products of a device against what it can do.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/buffer.h"
#include "kernels/kernels.h"
#include "launcher/matmul_case.h"

namespace ternion::launcher {

// Prints a table: matrices of well-known models times one row (cold weights), then times more and
// more rows, then experts. Percentages are of the device's copy bandwidth, bytes read and written
// together, and of the rate of its 8-bit matrix instructions, both measured now. With `json_path`,
// writes the same as one JSON object. Takes about a minute. FailedPrecondition without a device.
absl::Status BenchDeviceKernels(const std::string& json_path);

// Measures products on the device behind a table whose ops can be recorded.
class DeviceBench {
 public:
  struct Result {
    double seconds = 0;           // of one product
    double bytes_per_second = 0;  // of weights, those of experts without rows left out
    double macs_per_second = 0;
  };

  // Fills `weight_bytes` of the executor's memory with random codes. Both outlive it.
  DeviceBench(const kernels::Kernels& kernels, kernels::Executor& executor, int64_t weight_bytes);

  // The median over repetitions of a recording of many products, each with weights that are in no
  // cache (if the weights are several times as large as those) and routing of its own.
  // ResourceExhausted when one product needs more weights than there are; Internal when the device
  // failed.
  absl::StatusOr<Result> Run(const MatmulCase& c);

 private:
  struct Operands;
  absl::StatusOr<double> SecondsOf(const kernels::Recording& recording);
  kernels::TernaryMatrix NextMatrix(const MatmulCase& c);
  void Call(const MatmulCase& c, Operands& operands, int call);

  const kernels::Kernels& kernels_;
  kernels::Executor& executor_;
  base::Buffer weights_;
  size_t next_ = 0;  // byte of weights_ where the next matrix begins
  std::mt19937_64 rng_{1};
};

}  // namespace ternion::launcher
