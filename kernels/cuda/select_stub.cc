// Stands in for the CUDA kernels in a build without them.
#include "kernels/cuda/cublas.h"
#include "kernels/cuda/limits.h"
#include "kernels/select.h"

namespace ternion::kernels {

const Kernels* SelectCudaKernels(int, Executor&, std::string* why) {
  *why = "this build has no CUDA kernels";
  return nullptr;
}

// Nobody has a device to ask for.
double DeviceCopyBandwidth(Executor&) { return 0; }
DeviceLimits MeasureDeviceLimits(Executor&) { return {}; }

std::unique_ptr<Cublas> LoadCublas(const std::string&, const Executor&, std::string*) {
  return nullptr;
}

}  // namespace ternion::kernels
