// `ternion bench kernels`: the ternary matmul against what this machine can do at best.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace ternion::launcher {

struct BenchKernelsOptions {
  std::string device = "cpu";  // cpu | cuda
  int num_threads = 0;         // 0: every CPU this process may run on
  std::string cublas;          // cuda: a file to compare with; empty: what is found
  std::string json_path;       // empty: the table only
};

// Prints two tables, all of the matrices and live lines of them only; with `json_path`, writes the
// same as one JSON object. Weights come from memory, not from a cache: they rotate through a buffer
// of up to 2 GiB. Lines of the first table carry their percentage of the read bandwidth and of the
// peak of the dot product instruction, measured while that line was; those of the second how many
// times faster they were than all codes in panels. Takes about two minutes. The error of
// ChooseCpuKernels, or of writing the file. On a device, see device_bench.h.
absl::Status BenchKernels(const BenchKernelsOptions& options);

}  // namespace ternion::launcher
