// Transports between threads, and the collectives on top of them.
#include "comm/loopback/loopback.h"

#include <cstring>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "comm/collective.h"
#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

constexpr RankId kRank0{0}, kRank1{1}, kRank2{2};

Message MakeMessage(Transport& transport, const std::string& text) {
  Message message = transport.Acquire(text.size());
  std::memcpy(message.bytes().data(), text.data(), text.size());
  return message;
}

absl::StatusOr<std::string> ReceiveText(Transport& transport, std::vector<RankId> from,
                                        Phase phase) {
  TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport.Receive(from, phase));
  const auto bytes = arrival.message.bytes();
  std::string text(bytes.begin(), bytes.end());
  transport.Recycle(std::move(arrival.message));
  return absl::StrCat(base::Index(arrival.what.from), ":", text);
}

bool Contains(const absl::Status& status, const std::string& text) {
  return status.message().find(text) != absl::string_view::npos;
}

TEST(LoopbackTest, KeepsOrderWithinAPeerAndPhase) {
  auto world = MakeLoopbackWorld(3);
  const auto send = [&](int from, Phase phase, const std::string& text) {
    ASSERT_TRUE(world[from]->Send(kRank0, phase, MakeMessage(*world[from], text)).ok());
  };
  send(1, Phase::kCombine, "c1");
  send(2, Phase::kDispatch, "a2");
  send(1, Phase::kDispatch, "a1");
  send(1, Phase::kDispatch, "b1");
  const auto receive = [&](std::vector<RankId> from, Phase phase) {
    return ReceiveText(*world[0], from, phase).value();
  };
  EXPECT_EQ(receive({kRank1}, Phase::kDispatch), "1:a1");
  EXPECT_EQ(receive({kRank1, kRank2}, Phase::kDispatch), "2:a2") << "the first to arrive";
  EXPECT_EQ(receive({kRank1, kRank2}, Phase::kDispatch), "1:b1");
  EXPECT_EQ(receive({kRank1}, Phase::kCombine), "1:c1");
}

TEST(LoopbackTest, TryReceiveDoesNotWait) {
  auto world = MakeLoopbackWorld(3);
  const Awaited awaited[] = {{kRank1, Phase::kDispatch}, {kRank2, Phase::kCombine}};
  EXPECT_FALSE(world[0]->TryReceive(awaited).value().has_value());
  ASSERT_TRUE(world[1]->Send(kRank0, Phase::kCombine, MakeMessage(*world[1], "other")).ok());
  EXPECT_FALSE(world[0]->TryReceive(awaited).value().has_value()) << "of a phase nobody asked for";
  ASSERT_TRUE(world[2]->Send(kRank0, Phase::kCombine, MakeMessage(*world[2], "two")).ok());
  const auto arrival = world[0]->TryReceive(awaited).value();
  ASSERT_TRUE(arrival.has_value());
  EXPECT_EQ(arrival->what, awaited[1]);
  world[1].reset();
  EXPECT_TRUE(absl::IsUnavailable(world[0]->TryReceive(awaited).status()));
}

TEST(LoopbackTest, ReceiveWaitsForWhatComesLater) {
  auto world = MakeLoopbackWorld(2);
  std::thread peer([&] {
    // Only after rank 0 has spoken: rank 0 is past its first steps by then.
    EXPECT_TRUE(ReceiveText(*world[1], {kRank0}, Phase::kControl).ok());
    EXPECT_TRUE(world[1]->Send(kRank0, Phase::kControl, MakeMessage(*world[1], "back")).ok());
  });
  EXPECT_TRUE(world[0]->Send(kRank1, Phase::kControl, MakeMessage(*world[0], "go")).ok());
  EXPECT_EQ(ReceiveText(*world[0], {kRank1}, Phase::kControl).value(), "1:back");
  peer.join();
}

TEST(LoopbackTest, NodesGiveTheScope) {
  auto world = MakeLoopbackWorld(3, {0, 0, 1});
  EXPECT_EQ(world[0]->ScopeOf(kRank0), TrafficScope::kSelf);
  EXPECT_EQ(world[0]->ScopeOf(kRank1), TrafficScope::kIntraNode);
  EXPECT_EQ(world[1]->ScopeOf(kRank2), TrafficScope::kInterNode);
}

TEST(LoopbackTest, BuffersCirculate) {
  auto world = MakeLoopbackWorld(2);
  Message message = world[0]->Acquire(100'000);
  const uint8_t* memory = message.memory.data();
  ASSERT_TRUE(world[0]->Send(kRank1, Phase::kDispatch, std::move(message)).ok());
  Arrival arrival = world[1]->Receive({&kRank0, 1}, Phase::kDispatch).value();
  EXPECT_EQ(arrival.message.memory.data(), memory);
  EXPECT_EQ(arrival.message.size_bytes, 100'000u);
  world[1]->Recycle(std::move(arrival.message));
  EXPECT_EQ(world[0]->Acquire(90'000).memory.data(), memory) << "back at the sender";
  EXPECT_NE(world[0]->Acquire(90'000).memory.data(), nullptr);
}

TEST(LoopbackTest, WhatWasSentBeforeLeavingIsRead) {
  auto world = MakeLoopbackWorld(3);
  ASSERT_TRUE(world[1]->Send(kRank0, Phase::kDispatch, MakeMessage(*world[1], "last")).ok());
  world[1].reset();
  EXPECT_EQ(ReceiveText(*world[0], {kRank1, kRank2}, Phase::kDispatch).value(), "1:last");
  const absl::Status gone = ReceiveText(*world[0], {kRank2, kRank1}, Phase::kDispatch).status();
  EXPECT_EQ(gone.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(Contains(gone, "rank 1")) << gone;
  const absl::Status unsent = world[0]->Send(kRank1, Phase::kControl, world[0]->Acquire(1));
  EXPECT_TRUE(absl::IsUnavailable(unsent) && Contains(unsent, "rank 1")) << unsent;
}

TEST(LoopbackTest, ARankThatFailsEndsTheOthersWithItsReason) {
  const auto statuses = RunLoopback(4, [](Transport& transport) -> absl::Status {
    if (transport.rank() == kRank2) return absl::DataLossError("shard 5 is damaged");
    return ReceiveText(transport, {kRank2}, Phase::kDispatch).status();
  });
  EXPECT_EQ(statuses[2].code(), absl::StatusCode::kDataLoss);
  for (int rank : {0, 1, 3}) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kUnavailable);
    EXPECT_TRUE(Contains(statuses[rank], "rank 2 is gone: shard 5 is damaged")) << statuses[rank];
  }
}

TEST(LoopbackTest, ARankThatReturnsEarlyIsAnErrorToThoseThatWait) {
  const auto statuses = RunLoopback(2, [](Transport& transport) -> absl::Status {
    if (transport.rank() == kRank1) return absl::OkStatus();
    return ReceiveText(transport, {kRank1}, Phase::kCombine).status();
  });
  EXPECT_TRUE(statuses[1].ok());
  EXPECT_TRUE(absl::IsUnavailable(statuses[0]) && Contains(statuses[0], "rank 1")) << statuses[0];
}

TEST(CollectiveTest, BroadcastAndGather) {
  for (int num_ranks : {1, 2, 5}) {
    const auto statuses = RunLoopback(num_ranks, [&](Transport& transport) -> absl::Status {
      const int rank = base::Index(transport.rank());
      for (int round = 0; round < 20; ++round) {
        const std::string plan = std::string(round * 1000, 'x') + "plan";
        TERNION_ASSIGN_OR_RETURN(const std::string got,
                                 Broadcast(transport, rank == 0 ? plan : "ignored"));
        EXPECT_EQ(got, plan);
        TERNION_ASSIGN_OR_RETURN(const auto all, Gather(transport, std::string(rank, 'r')));
        EXPECT_EQ(all.size(), rank == 0 ? num_ranks : 0u);
        for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], std::string(i, 'r'));
      }
      return absl::OkStatus();
    });
    for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  }
}

TEST(CollectiveTest, AgreeOnStatusGivesAllTheErrorOfTheLowestRank) {
  const auto statuses = RunLoopback(4, [](Transport& transport) -> absl::Status {
    EXPECT_TRUE(AgreeOnStatus(transport, absl::OkStatus()).ok());
    absl::Status own;
    if (transport.rank() == kRank2) own = absl::DataLossError("shard 5 is damaged");
    if (base::Index(transport.rank()) == 3) own = absl::NotFoundError("no file");
    const absl::Status agreed = AgreeOnStatus(transport, own);
    EXPECT_EQ(agreed.code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(agreed.message(), "rank 2: shard 5 is damaged");
    EXPECT_TRUE(IsAgreed(agreed));
    EXPECT_FALSE(IsAgreed(absl::DataLossError("shard 5 is damaged")));
    return AgreeOnStatus(transport, absl::OkStatus());
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(CollectiveTest, AgreeOnValueNamesTheFirstRankThatDiffers) {
  RunLoopback(4, [](Transport& transport) -> absl::Status {
    EXPECT_TRUE(AgreeOnValue(transport, "trace", 7).ok());
    const bool differs = base::Index(transport.rank()) >= 2;
    const absl::Status agreed = AgreeOnValue(transport, "trace", differs ? 8 : 7);
    EXPECT_EQ(agreed.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(agreed.message(), "rank 2 has another trace than rank 0");
    return absl::OkStatus();
  });
}

TEST(CollectiveTest, AnErrorThatAllHaveNamesNoRank) {
  const auto statuses = RunLoopback(3, [](Transport& transport) -> absl::Status {
    EXPECT_EQ(AgreeOnStatus(transport, absl::NotFoundError("no file")).message(), "no file");
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(CollectiveTest, BroadcastStatusGivesAllTheStatusOfRank0) {
  const auto statuses = RunLoopback(3, [](Transport& transport) -> absl::Status {
    const bool first = transport.rank() == kRank0;
    const absl::Status agreed = BroadcastStatus(
        transport, first ? absl::NotFoundError("no file") : absl::InternalError("not looked at"));
    EXPECT_EQ(agreed.code(), absl::StatusCode::kNotFound);
    EXPECT_EQ(agreed.message(), "no file");
    EXPECT_TRUE(IsAgreed(agreed));
    return BroadcastStatus(transport, absl::OkStatus());
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(CollectiveTest, ADamagedControlMessageIsAnError) {
  auto world = MakeLoopbackWorld(2);
  const auto broadcast_to_rank1 = [&](const std::string& bytes) {
    EXPECT_TRUE(world[0]->Send(kRank1, Phase::kControl, MakeMessage(*world[0], bytes)).ok());
    return Broadcast(*world[1], "").status();
  };
  ASSERT_TRUE(Broadcast(*world[0], "the plan").ok());
  Arrival sent = world[1]->Receive({&kRank0, 1}, Phase::kControl).value();
  const std::string good(sent.message.bytes().begin(), sent.message.bytes().end());
  EXPECT_TRUE(broadcast_to_rank1(good).ok());
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] ^= 0x20;
    const absl::Status status = broadcast_to_rank1(bad);
    EXPECT_FALSE(status.ok()) << "byte " << i;
    EXPECT_TRUE(Contains(status, "rank 0")) << status;
    EXPECT_FALSE(broadcast_to_rank1(good.substr(0, i)).ok()) << "size " << i;
  }
}

}  // namespace
}  // namespace ternion::comm
