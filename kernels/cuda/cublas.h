// cuBLAS's dense product, for the bench to put beside ours.
//
// Nothing else wants cuBLAS, and it is hundreds of megabytes: neither the build nor the program
// needs it. The library is loaded by who asks for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/kernels.h"

namespace ternion::kernels {

// y[i][o] = dot(x[i], w[o]), summed at fp32 in an order of cuBLAS's own. Numbers are bits of bf16.
struct Bf16MatmulArgs {
  const uint16_t* x = nullptr;        // [num_rows, inputs]
  const uint16_t* weights = nullptr;  // [outputs, inputs]
  uint16_t* y = nullptr;              // [num_rows, outputs]
  int num_rows = 0;
  int outputs = 0;
  int inputs = 0;
};

class Cublas {
 public:
  virtual ~Cublas() = default;
  // As an op of its executor; may be recorded once it was called with the same sizes (the first
  // call loads code). Null, or what cuBLAS says is wrong.
  virtual const char* Matmul(const Bf16MatmulArgs& args) = 0;
  const std::string& version() const { return version_; }  // "13.0.2"

 protected:
  std::string version_;
};

// For the executor that SelectCudaKernels set up, which outlives it. `library`: a file; empty:
// whatever the system's loader finds of the versions that the driver can run. Null with `*why` set.
std::unique_ptr<Cublas> LoadCublas(const std::string& library, const Executor& executor,
                                   std::string* why);

}  // namespace ternion::kernels
