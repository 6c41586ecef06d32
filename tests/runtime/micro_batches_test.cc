#include "runtime/micro_batches.h"

#include "gtest/gtest.h"

namespace ternion::runtime {
namespace {

// Seconds of a step by way, and what of them one batch waits.
struct World {
  double one = 1;
  double two = 1;
  double wait = 0.5;
};

// How many of the next `steps` steps go in two.
int StepsInTwo(MicroBatchChooser& chooser, int64_t rows, const World& world, int steps) {
  int in_two = 0;
  for (int i = 0; i < steps; ++i) {
    const int micro_batches = chooser.Choose(rows);
    in_two += micro_batches == 2;
    chooser.Record(rows, micro_batches, micro_batches == 2 ? world.two : world.one,
                   micro_batches == 2 ? 0 : world.wait);
  }
  return in_two;
}

constexpr int kTrials = MicroBatchChooser::kTrials;
constexpr int kLook = MicroBatchChooser::kStepsBetweenLooks;

TEST(MicroBatchChooser, TakesTheFasterWayAndLooksAtTheOther) {
  MicroBatchChooser chooser;
  EXPECT_EQ(StepsInTwo(chooser, 32, {.two = 0.8}, kTrials), 0);
  EXPECT_EQ(StepsInTwo(chooser, 32, {.two = 0.8}, kTrials + kLook), kTrials + kLook - 1);
  MicroBatchChooser slower;
  EXPECT_EQ(StepsInTwo(slower, 32, {.two = 1.2}, 2 * kTrials + kLook), kTrials + 1);
}

TEST(MicroBatchChooser, NothingIsTriedWithoutWaitingOrWithFewRows) {
  MicroBatchChooser chooser;
  EXPECT_EQ(StepsInTwo(chooser, 512, {.two = 0.1, .wait = 0.1}, 1000), 0);
  EXPECT_EQ(StepsInTwo(chooser, MicroBatchChooser::kMinRows - 1, {.two = 0.1}, 1000), 0);
  EXPECT_EQ(StepsInTwo(chooser, 0, {.two = 0.1}, 10), 0);
}

TEST(MicroBatchChooser, SizesAreApart) {
  MicroBatchChooser chooser;
  StepsInTwo(chooser, 32, {.two = 0.8}, 3 * kTrials);
  EXPECT_EQ(chooser.Choose(33), 2) << "as many rows, about";
  EXPECT_EQ(chooser.Choose(512), 1) << "not tried yet";
}

TEST(MicroBatchChooser, FollowsLinksThatChange) {
  MicroBatchChooser chooser;
  StepsInTwo(chooser, 32, {.two = 0.8}, 3 * kTrials);
  EXPECT_LT(StepsInTwo(chooser, 32, {.one = 0.1}, 20 * kLook), 8 * kLook);
  EXPECT_EQ(chooser.Choose(32), 1);
}

TEST(MicroBatchChooser, TheFirstStepsOfAWayDoNotCount) {
  MicroBatchChooser chooser;
  chooser.Record(32, 1, 100, 100);  // grows buffers
  StepsInTwo(chooser, 32, {.two = 1.2}, 2 * kTrials);
  EXPECT_EQ(chooser.Choose(32), 1);
}

}  // namespace
}  // namespace ternion::runtime
