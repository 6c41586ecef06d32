#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/emulator/emulator.h"
#include "tests/kernels/cuda_variant.h"

namespace ternion::kernels {

const Kernels* CudaVariant(Executor& executor) {
  emulator::SetStrict(false);
  static Executor of_device;
  static std::string why;
  static const Kernels* const table = SelectCudaKernels(0, of_device, &why);
  EXPECT_NE(table, nullptr) << why;
  executor = of_device;
  executor.threads = nullptr;  // no op may use them
  return table;
}

bool UseWarpgroups(bool wanted) {
  emulator::SetWarpgroups(wanted);
  return true;
}

}  // namespace ternion::kernels
