// What of a memory is whose.
#include "runtime/memory_share.h"

#include "gtest/gtest.h"

namespace ternion::runtime {
namespace {

constexpr int64_t kGB = 1'000'000'000;

TEST(MemoryShare, WeightsLeaveRoomForTheCacheAndASixteenth) {
  EXPECT_EQ(RoomForWeights(16 * kGB, 3 * kGB), 12 * kGB);
  EXPECT_EQ(RoomForWeights(16 * kGB, 0), 14 * kGB);
  EXPECT_LT(RoomForWeights(16 * kGB, 16 * kGB), 0);
}

TEST(MemoryShare, ACacheOfNoGivenSizeTakesAQuarterOrWhatIsLeft) {
  EXPECT_EQ(DefaultKvBytes(16 * kGB, 1 * kGB), 4 * kGB);
  EXPECT_EQ(DefaultKvBytes(16 * kGB, 11 * kGB), 4 * kGB);
  EXPECT_EQ(DefaultKvBytes(16 * kGB, 12 * kGB), 3 * kGB);
  EXPECT_EQ(DefaultKvBytes(16 * kGB, 20 * kGB), 0);
}

}  // namespace
}  // namespace ternion::runtime
