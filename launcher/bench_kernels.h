// `ternion bench kernels`: the ternary matmul against what this machine can do at best.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace ternion::launcher {

struct BenchKernelsOptions {
  int num_threads = 0;    // 0: every CPU this process may run on
  std::string isa;        // as in SelectCpuKernels
  std::string json_path;  // empty: the table only
};

// Prints a table and writes the JSON file (docs/bench.md). Weights are read from memory, not from a
// cache: they rotate through a buffer of up to 2 GiB. Every line carries its percentage of the
// bandwidth and of the peak measured in the same run. Takes about ten seconds.
absl::Status BenchKernels(const BenchKernelsOptions& options);

}  // namespace ternion::launcher
