// Stands in for the CUDA kernels in a build without them.
#include "kernels/cuda/limits.h"
#include "kernels/select.h"

namespace ternion::kernels {

const Kernels* SelectCudaKernels(int, Executor&, std::string* why) {
  *why = "this build has no CUDA kernels";
  return nullptr;
}

DeviceLimits MeasureDeviceLimits(Executor&) { return {}; }  // nobody has a device to ask for

}  // namespace ternion::kernels
