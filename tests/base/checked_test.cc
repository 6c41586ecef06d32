#include "base/checked.h"

#include <limits>

#include "gtest/gtest.h"

namespace ternion::base {
namespace {

constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

TEST(Checked, MulAndAddAtTheEdge) {
  EXPECT_EQ(CheckedMul(0, kMax), 0u);
  EXPECT_EQ(CheckedMul(1, kMax), kMax);
  EXPECT_EQ(CheckedMul(kMax / 2, 2), kMax - 1);
  EXPECT_EQ(CheckedMul(kMax / 2 + 1, 2), std::nullopt);
  EXPECT_EQ(CheckedMul(uint64_t{1} << 32, uint64_t{1} << 32), std::nullopt);
  EXPECT_EQ(CheckedAdd(kMax - 1, 1), kMax);
  EXPECT_EQ(CheckedAdd(kMax, 1), std::nullopt);
}

TEST(Checked, Product) {
  const uint64_t factors[] = {uint64_t{1} << 40, 3, uint64_t{1} << 21, 2, 2};
  EXPECT_EQ(CheckedProduct({}), 1u);
  EXPECT_EQ(CheckedProduct({factors, 1}), uint64_t{1} << 40);
  EXPECT_EQ(CheckedProduct({factors, 3}), uint64_t{3} << 61);
  EXPECT_EQ(CheckedProduct({factors, 4}), uint64_t{3} << 62);
  EXPECT_EQ(CheckedProduct({factors, 5}), std::nullopt);
}

TEST(Checked, Rounding) {
  EXPECT_EQ(RoundUp(0, 64), 0);
  EXPECT_EQ(RoundUp(1, 64), 64);
  EXPECT_EQ(RoundUp(64, 64), 64);
  EXPECT_EQ(CeilDiv(0, 16), 0);
  EXPECT_EQ(CeilDiv(16, 16), 1);
  EXPECT_EQ(CeilDiv(17, 16), 2);
}

}  // namespace
}  // namespace ternion::base
