// What goes wrong with a launch is heard by whoever waits, and by nobody before.
#include <string>

#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/emulator/emulator.h"

namespace ternion::kernels {
namespace {

TEST(DeviceErrors, ARefusedLaunchIsToldByWaitFromThenOn) {
  static Executor executor, refused;  // their memories are as long as the process
  std::string why;
  const Kernels* const cuda = SelectCudaKernels(0, executor, &why);
  ASSERT_NE(cuda, nullptr) << why;
  const auto zero = [&] {
    cuda->zero({.out = reinterpret_cast<float*>(executor.scratch.data()), .count = 1}, executor);
  };
  zero();
  EXPECT_EQ(cuda->wait(executor), nullptr);
  emulator::RefuseLaunches();
  zero();
  EXPECT_STREQ(cuda->wait(executor), "invalid argument");
  EXPECT_STREQ(cuda->wait(executor), "invalid argument");
  EXPECT_EQ(SelectCudaKernels(0, refused, &why), nullptr);
  EXPECT_EQ(why, "device 0 runs no kernel of this build: invalid argument");
}

}  // namespace
}  // namespace ternion::kernels
