// Measuring products on a device, emulated: that it runs, what it counts and what it refuses.
#include "launcher/device_bench.h"

#include "gtest/gtest.h"
#include "kernels/select.h"

namespace ternion::launcher {
namespace {

class Bench : public testing::Test {
 protected:
  static DeviceBench Make(int64_t weight_bytes) {
    static kernels::Executor executor;
    static std::string why;
    static const kernels::Kernels* const table = kernels::SelectCudaKernels(0, executor, &why);
    EXPECT_NE(table, nullptr) << why;
    return DeviceBench(*table, executor, weight_bytes);
  }
};

TEST_F(Bench, CountsWeightsAndProducts) {
  DeviceBench bench = Make(1 << 19);
  const MatmulCase dense = {.outputs = 512, .inputs = 2048, .tokens = 3};
  const absl::StatusOr<DeviceBench::Result> result = bench.Run(dense);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GT(result->seconds, 0);
  EXPECT_NEAR(result->bytes_per_second * result->seconds, 512 * 2048 / 4, 1);
  EXPECT_NEAR(result->macs_per_second * result->seconds, 3 * 512 * 2048, 1);
}

TEST_F(Bench, ExpertsWithoutRowsAreNotCounted) {
  DeviceBench bench = Make(1 << 19);
  const MatmulCase experts = {
      .outputs = 256, .inputs = 1024, .tokens = 1, .num_experts = 4, .top_k = 2};
  const absl::StatusOr<DeviceBench::Result> result = bench.Run(experts);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NEAR(result->bytes_per_second * result->seconds, 2 * 256 * 1024 / 4, 1);
  EXPECT_NEAR(result->macs_per_second * result->seconds, 2 * 256 * 1024, 1);
}

TEST_F(Bench, RefusesWhatDoesNotFit) {
  DeviceBench bench = Make(1 << 19);
  const absl::Status status = bench.Run({.outputs = 4096, .inputs = 4096, .tokens = 1}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace ternion::launcher
