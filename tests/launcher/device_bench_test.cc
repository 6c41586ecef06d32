// Measuring products on a device, emulated: that it runs, what it counts and what it refuses.
#include "launcher/device_bench.h"

#include <dlfcn.h>

#include "gtest/gtest.h"
#include "kernels/select.h"

namespace ternion::launcher {
namespace {

using kernels::TernaryLayout;

class Bench : public testing::Test {
 protected:
  static kernels::Executor& Device() {
    static kernels::Executor executor;
    return executor;
  }
  static DeviceBench Make(int64_t weight_bytes) {
    static std::string why;
    static const kernels::Kernels* const table = kernels::SelectCudaKernels(0, Device(), &why);
    EXPECT_NE(table, nullptr) << why;
    return DeviceBench(*table, Device(), weight_bytes);
  }
};

TEST_F(Bench, CountsWeightsAndProducts) {
  DeviceBench bench = Make(1 << 19);
  const MatmulCase dense = {.outputs = 512, .inputs = 2048, .tokens = 3};
  const absl::StatusOr<DeviceBench::Result> result = bench.Run(dense, TernaryLayout::kTiles);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GT(result->seconds, 0);
  EXPECT_NEAR(result->bytes_per_second * result->seconds, 512 * 2048 / 4, 1);
  EXPECT_NEAR(result->macs_per_second * result->seconds, 3 * 512 * 2048, 1);
}

TEST_F(Bench, ExpertsWithoutRowsAreNotCounted) {
  DeviceBench bench = Make(1 << 19);
  const MatmulCase experts = {
      .outputs = 256, .inputs = 1024, .tokens = 1, .num_experts = 4, .top_k = 2};
  const absl::StatusOr<DeviceBench::Result> result = bench.Run(experts, TernaryLayout::kTilesBase3);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NEAR(result->bytes_per_second * result->seconds, 2 * 256 * 1024 * 13 / 64, 1);
  EXPECT_NEAR(result->macs_per_second * result->seconds, 2 * 256 * 1024, 1);
}

TEST_F(Bench, RefusesWhatDoesNotFit) {
  DeviceBench bench = Make(1 << 19);
  const absl::Status status =
      bench.Run({.outputs = 4096, .inputs = 4096, .tokens = 1}, TernaryLayout::kTiles).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
}

// Matrices of half the weights, or a quarter, are two different ones, or four.
TEST_F(Bench, CublasMultipliesByWeightsInTurn) {
  DeviceBench bench = Make(1 << 16);
  std::string why;
  const auto cublas = kernels::LoadCublas(TERNION_EMULATED_CUBLAS, Device(), &why);
  ASSERT_NE(cublas, nullptr) << why;
  const auto weights_seen = reinterpret_cast<int (*)()>(
      dlsym(dlopen(TERNION_EMULATED_CUBLAS, RTLD_NOW), "EmulatedCublasWeights"));
  ASSERT_NE(weights_seen, nullptr);
  const auto seconds = bench.RunCublas({.outputs = 128, .inputs = 128, .tokens = 1}, *cublas);
  ASSERT_TRUE(seconds.ok()) << seconds.status();
  EXPECT_GT(*seconds, 0);
  EXPECT_EQ(weights_seen(), 2);
  ASSERT_TRUE(bench.RunCublas({.outputs = 64, .inputs = 128, .tokens = 3}, *cublas).ok());
  EXPECT_EQ(weights_seen(), 4);
  EXPECT_EQ(bench.RunCublas({.outputs = 256, .inputs = 256, .tokens = 1}, *cublas).status().code(),
            absl::StatusCode::kResourceExhausted);
}

// As a device would be that has run out of something.
TEST_F(Bench, SaysWhatCublasRefuses) {
  DeviceBench bench = Make(1 << 16);
  std::string why;
  kernels::Executor executor = Device();
  executor.scratch = {};
  const auto cublas = kernels::LoadCublas(TERNION_EMULATED_CUBLAS, executor, &why);
  ASSERT_NE(cublas, nullptr) << why;
  const absl::Status status =
      bench.RunCublas({.outputs = 128, .inputs = 128, .tokens = 1}, *cublas).status();
  EXPECT_EQ(status, absl::InternalError("CUBLAS_STATUS_NOT_SUPPORTED"));
}

}  // namespace
}  // namespace ternion::launcher
