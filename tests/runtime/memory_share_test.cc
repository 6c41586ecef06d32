// What of a memory is whose.
#include "runtime/memory_share.h"

#include "gtest/gtest.h"

namespace ternion::runtime {
namespace {

constexpr int64_t kGB = 1'000'000'000;

TEST(MemoryShare, WeightsLeaveRoomForTheCacheAndALittle) {
  EXPECT_EQ(RoomForWeights(64 * kGB, 3 * kGB), 60 * kGB);
  EXPECT_EQ(RoomForWeights(64 * kGB, 0), 59 * kGB);
  EXPECT_LT(RoomForWeights(64 * kGB, 64 * kGB), 0);
}

TEST(MemoryShare, ACacheOfNoGivenSizeTakesAQuarterOrWhatIsLeft) {
  EXPECT_EQ(DefaultKvBytes(64 * kGB, 1 * kGB), 16 * kGB);
  EXPECT_EQ(DefaultKvBytes(64 * kGB, 47 * kGB), 16 * kGB);
  EXPECT_EQ(DefaultKvBytes(64 * kGB, 50 * kGB), 13 * kGB);
  EXPECT_EQ(DefaultKvBytes(64 * kGB, 80 * kGB), 0);
}

}  // namespace
}  // namespace ternion::runtime
