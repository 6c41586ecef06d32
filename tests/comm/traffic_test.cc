#include "comm/traffic.h"

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

constexpr RankId kRank0{0}, kRank1{1}, kRank2{2}, kRank3{3};

TEST(TrafficTest, CountsByDirectionPhaseAndPeerAndSumsByScope) {
  auto world = MakeLoopbackWorld(4, {0, 0, 1, 1});
  TrafficMeter& meter = world[0]->traffic();
  const auto sent = [&](Phase phase, RankId to, const TrafficCount& count) {
    meter.Add(Direction::kSent, phase, to, count);
  };
  sent(Phase::kDispatch, kRank0, {.payload_bytes = 1000, .rows = 10});
  sent(Phase::kDispatch, kRank1, {100, 140, 1, 5});
  sent(Phase::kDispatch, kRank2, {10, 50, 1, 2});
  sent(Phase::kDispatch, kRank3, {20, 60, 1, 3});
  sent(Phase::kCombine, kRank3, {7, 47, 1, 1});
  meter.Add(Direction::kReceived, Phase::kDispatch, kRank3, {1, 41, 1, 1});

  EXPECT_EQ(meter.at(Direction::kSent, Phase::kDispatch, kRank3).message_bytes, 60);
  EXPECT_EQ(meter.at(Direction::kReceived, Phase::kDispatch, kRank3).message_bytes, 41);
  EXPECT_EQ(meter.at(Direction::kReceived, Phase::kCombine, kRank3).message_bytes, 0);
  const auto of_scope = [&](TrafficScope scope) {
    return world[0]->Traffic(Direction::kSent, Phase::kDispatch, scope);
  };
  EXPECT_EQ(of_scope(TrafficScope::kSelf).payload_bytes, 1000);
  EXPECT_EQ(of_scope(TrafficScope::kIntraNode).payload_bytes, 100);
  EXPECT_EQ(of_scope(TrafficScope::kInterNode).payload_bytes, 30);
  EXPECT_EQ(of_scope(TrafficScope::kInterNode).messages, 2);
  const TrafficCount wire = world[0]->WireTraffic(Direction::kSent, Phase::kDispatch);
  EXPECT_EQ(wire.payload_bytes, 130) << "own rows are no wire traffic";
  EXPECT_EQ(wire.message_bytes, 250);
  EXPECT_EQ(wire.messages, 3);
  EXPECT_EQ(wire.rows, 10);
}

TEST(TrafficTest, TimeOfExchangesThatOverlapCountsOnce) {
  using std::chrono::seconds;
  TrafficMeter meter;
  const TrafficMeter::Clock::time_point start;
  meter.RowsLeave(start);
  meter.RowsLeave(start + seconds(1));
  meter.RowsArrived(start + seconds(3));
  meter.RowsLeave(start + seconds(4));
  meter.RowsArrived(start + seconds(5));
  meter.RowsArrived(start + seconds(6));
  EXPECT_EQ(meter.wire_seconds(), 6);
  meter.RowsLeave(start + seconds(10));
  meter.RowsArrived(start + seconds(12));
  EXPECT_EQ(meter.wire_seconds(), 8);
}

TEST(TrafficTest, ResetForgetsAll) {
  TrafficMeter meter;
  meter.Add(Direction::kSent, Phase::kCombine, kRank1, {1, 2, 3, 4});
  meter.AddWait(0.5);
  const TrafficMeter::Clock::time_point start;
  meter.RowsLeave(start);
  meter.RowsArrived(start + std::chrono::milliseconds(250));
  EXPECT_EQ(meter.wait_seconds(), 0.5);
  EXPECT_EQ(meter.wire_seconds(), 0.25);
  meter.Reset();
  EXPECT_EQ(meter.at(Direction::kSent, Phase::kCombine, kRank1).messages, 0);
  EXPECT_EQ(meter.wait_seconds(), 0);
  EXPECT_EQ(meter.wire_seconds(), 0);
}

}  // namespace
}  // namespace ternion::comm
