#include "comm/traffic.h"

#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

TEST(TrafficMeterTest, CountsByPhaseAndScope) {
  TrafficMeter meter;
  meter.Add(Phase::kDispatch, TrafficScope::kSelf, {.payload_bytes = 1000, .rows = 10});
  meter.Add(Phase::kDispatch, TrafficScope::kIntraNode, {100, 140, 1, 5});
  meter.Add(Phase::kDispatch, TrafficScope::kInterNode, {10, 50, 1, 2});
  meter.Add(Phase::kDispatch, TrafficScope::kInterNode, {20, 60, 1, 3});
  meter.Add(Phase::kCombine, TrafficScope::kInterNode, {7, 47, 1, 1});
  EXPECT_EQ(meter.at(Phase::kDispatch, TrafficScope::kInterNode).payload_bytes, 30);
  EXPECT_EQ(meter.at(Phase::kDispatch, TrafficScope::kInterNode).message_bytes, 110);
  EXPECT_EQ(meter.at(Phase::kControl, TrafficScope::kInterNode).messages, 0);
  const TrafficCount wire = meter.Wire(Phase::kDispatch);
  EXPECT_EQ(wire.payload_bytes, 130) << "own rows are no wire traffic";
  EXPECT_EQ(wire.message_bytes, 250);
  EXPECT_EQ(wire.messages, 3);
  EXPECT_EQ(wire.rows, 10);
  meter.Reset();
  EXPECT_EQ(meter.Wire(Phase::kCombine).messages, 0);
}

}  // namespace
}  // namespace ternion::comm
