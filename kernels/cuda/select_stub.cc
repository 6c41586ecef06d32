// Stands in for the CUDA kernels in a build without them.
#include "kernels/select.h"

namespace ternion::kernels {

const Kernels* SelectCudaKernels(int, Executor&, std::string* why) {
  *why = "this build has no CUDA kernels";
  return nullptr;
}

}  // namespace ternion::kernels
