#include "launcher/statistics.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::launcher {
namespace {

TEST(Statistics, LogSumExpOfLargeAndSmallLogits) {
  EXPECT_DOUBLE_EQ(LogSumExp(std::vector<float>{0, 0, 0, 0}), std::log(4.0));
  EXPECT_DOUBLE_EQ(LogSumExp(std::vector<float>{1000, 1000}), 1000 + std::log(2.0));
  EXPECT_DOUBLE_EQ(LogSumExp(std::vector<float>{-1000}), -1000);
}

double Kl(const std::vector<float>& reference, const std::vector<float>& logits) {
  return KlDivergence(reference, LogSumExp(reference), logits, LogSumExp(logits));
}

TEST(Statistics, KlDivergenceByHand) {
  const float ln3 = std::log(3.0f);
  // (3/4, 1/4) against (1/2, 1/2), and the other way round.
  EXPECT_NEAR(Kl({ln3, 0}, {5, 5}), 0.75 * std::log(1.5) + 0.25 * std::log(0.5), 1e-7);
  EXPECT_NEAR(Kl({5, 5}, {ln3, 0}), 0.5 * std::log(2.0 / 3) + 0.5 * std::log(2.0), 1e-7);
  EXPECT_EQ(Kl({1, -2, 3}, {1, -2, 3}), 0);
  EXPECT_NEAR(Kl({1, -2, 3}, {2, -1, 4}), 0, 1e-7);  // the same distribution
  EXPECT_GE(Kl({0.1f, 0.2f, 0.3f}, {0.1f + 1e-7f, 0.2f, 0.3f}), 0);
  EXPECT_TRUE(std::isnan(Kl({0, 0}, {std::numeric_limits<float>::quiet_NaN(), 0})));
}

TEST(Statistics, PercentileIsOneOfTheValues) {
  std::vector<float> values(1001);
  std::iota(values.rbegin(), values.rend(), 0.0f);  // 1000 .. 0
  EXPECT_EQ(Percentile(values, 0.5), 500);
  EXPECT_EQ(Percentile(values, 0.999), 999);
  EXPECT_EQ(Percentile(values, 1), 1000);
  values.resize(1000);  // 1000 .. 1
  EXPECT_EQ(Percentile(values, 0.999), 999);
  values.resize(999);
  EXPECT_EQ(Percentile(values, 0.999), 1000);
  EXPECT_EQ(Percentile<float>({7}, 0.999), 7);
}

}  // namespace
}  // namespace ternion::launcher
