// The exchange between ranks that are threads.
#include "comm/exchange.h"

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/comm/counting_new.h"
#include "tests/comm/exchange_case.h"
#include "tests/comm/faulty_transport.h"

namespace ternion::comm {
namespace {

using Outs = std::vector<std::vector<std::vector<float>>>;  // [rank][layer][num_rows * hidden]

ExchangeCase MakeCase(int num_ranks, RowFormat dispatch, RowFormat combine, bool presum) {
  ExchangeCase c;
  c.num_ranks = num_ranks;
  c.options = {.dispatch = dispatch,
               .combine = combine,
               .presum = presum,
               .act_bits = dispatch == RowFormat::kInt4 ? 4 : 8,
               .hidden = num_ranks % 2 == 0 ? 72 : 101,
               .max_rows = 9,
               .top_k = 3,
               .num_experts = 8};
  return c;
}

Outs RunWorld(const ExchangeCase& c) {
  Outs outs(c.num_ranks);
  const auto statuses = RunLoopback(c.num_ranks, [&](Transport& transport) {
    return RunRank(c, transport, &outs[base::Index(transport.rank())]);
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  return outs;
}

void ExpectErrorFromRank(int rank, const char* text, const absl::Status& status) {
  EXPECT_FALSE(status.ok());
  const std::string who = absl::StrCat("rank ", rank);
  EXPECT_NE(status.message().find(who), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find(text), absl::string_view::npos) << status;
}

Outs ReferenceOuts(const ExchangeCase& c) {
  Outs outs(c.num_ranks);
  for (int rank = 0; rank < c.num_ranks; ++rank) {
    for (int layer = 0; layer < c.num_layers; ++layer) {
      outs[rank].push_back(ReferenceOut(c, layer, rank));
    }
  }
  return outs;
}

TEST(ExchangeTest, ExactWireEqualsTheSerialSumForAnyPlacement) {
  for (int num_ranks = 1; num_ranks <= 5; ++num_ranks) {
    ExchangeCase c = MakeCase(num_ranks, RowFormat::kInt8, RowFormat::kFp32, false);
    const Outs expected = ReferenceOuts(c);
    for (c.placement_seed = 1; c.placement_seed <= 3; ++c.placement_seed) {
      EXPECT_EQ(RunWorld(c), expected) << num_ranks << " ranks";
      EXPECT_EQ(ReferenceOuts(c), expected);
    }
  }
}

using Wire = std::tuple<RowFormat, RowFormat, int>;
std::string WireName(const testing::TestParamInfo<Wire>& info) {
  const auto [dispatch, combine, num_ranks] = info.param;
  return absl::StrCat(RowFormatName(dispatch), "_", RowFormatName(combine), "_", num_ranks);
}

class ExchangeWireTest : public testing::TestWithParam<Wire> {};

TEST_P(ExchangeWireTest, PresumEqualsItsReference) {
  const auto [dispatch, combine, num_ranks] = GetParam();
  const ExchangeCase c = MakeCase(num_ranks, dispatch, combine, true);
  EXPECT_EQ(RunWorld(c), ReferenceOuts(c));
}

INSTANTIATE_TEST_SUITE_P(Wires, ExchangeWireTest,
                         testing::Combine(testing::Values(RowFormat::kFp32, RowFormat::kBf16,
                                                          RowFormat::kInt8, RowFormat::kInt4),
                                          testing::Values(RowFormat::kFp32, RowFormat::kBf16,
                                                          RowFormat::kInt8, RowFormat::kInt4),
                                          testing::Values(1, 2, 3)),
                         WireName);

// However many rows are waited for, and whether or not two halves take turns: the same bits.
TEST(ExchangeTest, EarlyArrivalsAndMicroBatchesChangeNothing) {
  for (bool presum : {true, false}) {
    for (int num_ranks = 1; num_ranks <= 5; ++num_ranks) {
      ExchangeCase c = MakeCase(num_ranks, RowFormat::kInt8,
                                presum ? RowFormat::kInt4 : RowFormat::kFp32, presum);
      c.num_layers = 6;
      const Outs expected = ReferenceOuts(c);
      for (c.micro_batches = 1; c.micro_batches <= 2; ++c.micro_batches) {
        for (int64_t min_routes : {int64_t{1}, int64_t{9}, Exchange::kAllRoutes}) {
          c.min_routes = min_routes;
          EXPECT_EQ(RunWorld(c), expected) << num_ranks << " ranks, " << c.micro_batches
                                           << " micro-batches, " << min_routes << " routes";
        }
      }
    }
  }
}

// Phases are not ordered between each other: what a peer returns may overtake its own rows.
TEST(ExchangeTest, ACombineMayOvertakeADispatch) {
  for (RowFormat dispatch : {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8}) {
    for (Phase first : {Phase::kCombine, Phase::kDispatch}) {
      ExchangeCase c = MakeCase(3, dispatch, RowFormat::kBf16, true);
      c.num_layers = 20;
      c.min_routes = 1;  // so that ranks return rows early
      Outs outs(c.num_ranks);
      const auto statuses = RunLoopback(c.num_ranks, [&](Transport& transport) {
        FaultyTransport faulty(&transport);
        faulty.first = first;
        return RunRank(c, faulty, &outs[base::Index(transport.rank())]);
      });
      for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
      EXPECT_EQ(outs, ReferenceOuts(c)) << RowFormatName(dispatch);
    }
  }
}

// Any bit of any message, wherever it is: the receiver says whose message it was.
TEST(ExchangeTest, AFlippedBitIsCaughtAndNamed) {
  for (Phase phase : {Phase::kDispatch, Phase::kCombine}) {
    for (int bit = 0; bit < 64 * 8; bit += 7) {
      ExchangeCase c = MakeCase(3, RowFormat::kInt8, RowFormat::kInt8, true);
      c.seed = 3;
      const auto statuses = RunLoopback(c.num_ranks, [&](Transport& transport) {
        FaultyTransport faulty(&transport);
        bool done = false;
        faulty.on_send = [&](RankId to, Phase of, Message& message) {
          const bool chosen = transport.rank() == RankId{2} && to == RankId{1} && of == phase;
          if (!chosen || std::exchange(done, true)) return;
          const size_t byte = bit / 8 * (message.size_bytes - 1) / 64;  // over the whole message
          message.bytes()[byte] ^= 1 << bit % 8;
        };
        std::vector<std::vector<float>> outs;
        return RunRank(c, faulty, &outs);
      });
      ExpectErrorFromRank(2, phase == Phase::kDispatch ? "dispatch message" : "combine message",
                          statuses[1]);
      EXPECT_TRUE(statuses[0].ok() || absl::IsUnavailable(statuses[0])) << statuses[0];
    }
  }
}

TEST(ExchangeTest, DispatchIsLossless) {
  // Rows on one rank never travel: the single rank shows what the experts multiply at home.
  for (RowFormat dispatch : {RowFormat::kFp32, RowFormat::kInt8}) {
    const ExchangeCase c = MakeCase(3, dispatch, RowFormat::kFp32, false);
    EXPECT_EQ(RunWorld(c), RunWorld(MakeCase(3, RowFormat::kInt8, RowFormat::kFp32, false)));
  }
  Outs narrow;
  for (RowFormat dispatch : {RowFormat::kInt4, RowFormat::kInt8, RowFormat::kFp32}) {
    ExchangeCase c = MakeCase(3, dispatch, RowFormat::kFp32, false);
    c.options.act_bits = 4;
    const Outs outs = RunWorld(c);
    if (narrow.empty()) narrow = outs;
    EXPECT_EQ(outs, narrow) << RowFormatName(dispatch);
  }
}

TEST(ExchangeTest, PresumIsCloseToExact) {
  const Outs exact = RunWorld(MakeCase(4, RowFormat::kInt8, RowFormat::kFp32, false));
  const Outs presum = RunWorld(MakeCase(4, RowFormat::kInt8, RowFormat::kFp32, true));
  for (size_t rank = 0; rank < exact.size(); ++rank) {
    for (size_t layer = 0; layer < exact[rank].size(); ++layer) {
      for (size_t i = 0; i < exact[rank][layer].size(); ++i) {
        ASSERT_NEAR(presum[rank][layer][i], exact[rank][layer][i], 1e-5);
      }
    }
  }
}

TEST(ExchangeTest, RanksWithoutRowsTakePart) {
  ExchangeCase c = MakeCase(3, RowFormat::kInt8, RowFormat::kBf16, true);
  for (c.seed = 1; c.seed < 20; ++c.seed) {
    c.options.max_rows = 1;  // half of the ranks have none
    EXPECT_EQ(RunWorld(c), ReferenceOuts(c)) << c.seed;
  }
}

// Two ranks, worked by hand: rank 0 has two rows, rank 1 none.
class TwoRanks {
 public:
  explicit TwoRanks(const ExchangeOptions& options) : options_(options) {
    for (int rank = 0; rank < 2; ++rank) {
      exchanges_.push_back(std::make_unique<Exchange>(options, world_[rank].get(),
                                                      kernels::SelectCpuKernels(""), &executor_));
    }
    plan_.rank_begin = {0, 1, 3};
    plan_.rows = {{0, 0, 1}, {0, 1, 2}, {1, 3, 1}};
    plan_.routes = {
        {ExpertId{1}, 0.5f}, {ExpertId{2}, 1.0f}, {ExpertId{3}, 1.0f}, {ExpertId{2}, 2.0f}};
  }

  absl::Status Dispatch(int rank, uint32_t step = 1, uint32_t layer = 2) {
    return exchanges_[rank]->DispatchSend(step, layer, rank == 0 ? plan_ : no_rows_,
                                          codes_.rows(rank == 0 ? 2 : 0), normed_.data());
  }

  // Both ranks up to DispatchRecv, with every code 1 and scale 1.
  void DispatchBoth() {
    std::fill_n(codes_.rows(2).codes, 2 * codes_.rows(2).stride, int8_t{1});
    std::fill_n(codes_.rows(2).scales, 2, 1.0f);
    for (int rank = 0; rank < 2; ++rank) EXPECT_TRUE(Dispatch(rank).ok());
    for (int rank = 0; rank < 2; ++rank) EXPECT_TRUE(exchanges_[rank]->DispatchRecv().ok());
  }

  Exchange& exchange(int rank) { return *exchanges_[rank]; }
  Transport& transport(int rank) { return *world_[rank]; }
  void Leave(int rank) { world_[rank].reset(); }

 private:
  const ExchangeOptions options_;
  std::vector<std::unique_ptr<Transport>> world_ = MakeLoopbackWorld(2, {0, 1});
  base::ThreadPool threads_{1};
  kernels::Executor executor_{.threads = &threads_};
  std::vector<std::unique_ptr<Exchange>> exchanges_;
  DispatchPlan plan_;
  const DispatchPlan no_rows_{.rank_begin = {0, 0, 0}, .rows = {}, .routes = {}};
  kernels::QuantizedBuffer codes_{2, options_.hidden};
  std::vector<float> normed_ = std::vector<float>(2 * options_.hidden);
};

constexpr ExchangeOptions kTwoRankOptions = {.dispatch = RowFormat::kInt8,
                                             .combine = RowFormat::kInt8,
                                             .presum = true,
                                             .act_bits = 4,
                                             .hidden = 130,
                                             .max_rows = 2,
                                             .top_k = 3,
                                             .num_experts = 4};

void ExpectTraffic(Transport& transport, Phase phase, TrafficScope scope,
                   const TrafficCount& expected) {
  const TrafficCount count = transport.Traffic(Direction::kSent, phase, scope);
  EXPECT_EQ(count.payload_bytes, expected.payload_bytes);
  EXPECT_EQ(count.message_bytes, expected.message_bytes);
  EXPECT_EQ(count.messages, expected.messages);
  EXPECT_EQ(count.rows, expected.rows);
}

TEST(ExchangeTest, CountsTheBytesThatLeave) {
  struct Case {
    RowFormat dispatch, combine;
    bool presum;
    int64_t dispatch_row, combine_row;  // bytes with scales
    int64_t returned;                   // rows that rank 1 sends back
  };
  const Case cases[] = {
      {RowFormat::kInt8, RowFormat::kInt8, true, 130 + 4, 130 + 2 * 2, 2},
      {RowFormat::kInt4, RowFormat::kInt4, true, 65 + 4, 65 + 5 * 2, 2},
      {RowFormat::kBf16, RowFormat::kBf16, true, 260, 260, 2},
      {RowFormat::kFp32, RowFormat::kFp32, true, 520, 520, 2},
      {RowFormat::kInt8, RowFormat::kFp32, false, 134, 520, 3},
  };
  for (const Case& c : cases) {
    ExchangeOptions options = kTwoRankOptions;
    options.dispatch = c.dispatch;
    options.combine = c.combine;
    options.presum = c.presum;
    TwoRanks ranks(options);
    ranks.DispatchBoth();
    const std::vector<float> outputs(4 * 130, 1.0f);
    std::vector<float> out(2 * 130);
    for (int rank = 0; rank < 2; ++rank) {
      ASSERT_TRUE(ranks.exchange(rank).CombineSend(outputs.data()).ok());
    }
    for (int rank = 0; rank < 2; ++rank) {
      ASSERT_EQ(ranks.exchange(rank).DispatchRecv().value(), nullptr);
      ASSERT_TRUE(ranks.exchange(rank).CombineRecv(out.data()).ok());
    }
    // Header 40, 3 routes of 4 + 2 bytes, 2 counts: already a multiple of 4.
    const int64_t dispatched = 2 * c.dispatch_row;
    ExpectTraffic(ranks.transport(0), Phase::kDispatch, TrafficScope::kInterNode,
                  {dispatched, 40 + 18 + 2 + dispatched, 1, 2});
    ExpectTraffic(ranks.transport(0), Phase::kDispatch, TrafficScope::kSelf,
                  {c.dispatch_row, 0, 0, 1});
    ExpectTraffic(ranks.transport(1), Phase::kDispatch, TrafficScope::kInterNode, {0, 40, 1, 0});
    const int64_t returned = c.returned * c.combine_row;
    ExpectTraffic(ranks.transport(1), Phase::kCombine, TrafficScope::kInterNode,
                  {returned, 40 + returned, 1, 2});
    ExpectTraffic(ranks.transport(0), Phase::kCombine, TrafficScope::kInterNode, {0, 0, 0, 0});
    ExpectTraffic(ranks.transport(0), Phase::kCombine, TrafficScope::kSelf,
                  {c.combine_row, 0, 0, 1});
    ExpectTraffic(ranks.transport(0), Phase::kDispatch, TrafficScope::kIntraNode, {0, 0, 0, 0});
  }
}

TEST(ExchangeTest, ALayerInSteadyStateAllocatesNothing) {
  for (RowFormat format :
       {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8, RowFormat::kInt4}) {
    ExchangeOptions options = kTwoRankOptions;
    options.dispatch = format;
    options.combine = format;
    TwoRanks ranks(options);
    const std::vector<float> outputs(4 * 130, 1.0f);
    std::vector<float> out(2 * 130);
    int64_t before = 0;
    for (int layer = 0; layer < 8; ++layer) {
      if (layer == 4) before = NumAllocations();
      for (int rank = 0; rank < 2; ++rank) (void)ranks.Dispatch(rank);
      for (int rank = 0; rank < 2; ++rank) (void)ranks.exchange(rank).DispatchRecv();
      for (int rank = 0; rank < 2; ++rank) (void)ranks.exchange(rank).CombineSend(outputs.data());
      for (int rank = 0; rank < 2; ++rank) (void)ranks.exchange(rank).DispatchRecv();
      for (int rank = 0; rank < 2; ++rank) (void)ranks.exchange(rank).CombineRecv(out.data());
    }
    EXPECT_GT(before, 0);
    EXPECT_EQ(NumAllocations(), before) << RowFormatName(format);
  }
}

TEST(ExchangeTest, OwnRowsAndEarlyPeersComeFirst) {
  TwoRanks ranks(kTwoRankOptions);
  ASSERT_TRUE(ranks.Dispatch(0).ok());
  const ReceivedRows* own = ranks.exchange(0).DispatchRecv(/*min_routes=*/1).value();
  ASSERT_NE(own, nullptr) << "rank 1 has not spoken";
  ASSERT_EQ(own->rows.size(), 1u);
  EXPECT_EQ(own->routes[0].expert, ExpertId{1});
  const std::vector<float> outputs(130);
  ASSERT_TRUE(ranks.exchange(0).CombineSend(outputs.data()).ok());
  ASSERT_TRUE(ranks.Dispatch(1).ok());
  EXPECT_EQ(ranks.exchange(0).DispatchRecv(1).value(), nullptr) << "rank 1 has no rows";
}

TEST(ExchangeTest, RowsAreOrderedBySourceWhateverArrivesFirst) {
  auto world = MakeLoopbackWorld(3);
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  ExchangeOptions options = kTwoRankOptions;
  std::vector<std::unique_ptr<Exchange>> exchanges(3);
  std::vector<kernels::QuantizedBuffer> codes(3);
  for (int rank : {2, 0, 1}) {  // rank 2 speaks first
    exchanges[rank] = std::make_unique<Exchange>(options, world[rank].get(),
                                                 kernels::SelectCpuKernels(""), &executor);
    codes[rank] = kernels::QuantizedBuffer(1, options.hidden);
    codes[rank].rows(1).scales[0] = static_cast<float>(rank);
    const DispatchPlan to_rank1{
        .rank_begin = {0, 0, 1, 1}, .rows = {{0, 0, 1}}, .routes = {{ExpertId{rank}, 1.0f}}};
    ASSERT_TRUE(exchanges[rank]->DispatchSend(0, 0, to_rank1, codes[rank].rows(1), nullptr).ok());
  }
  const ReceivedRows* received = exchanges[1]->DispatchRecv().value();
  ASSERT_EQ(received->rows.size(), 3u);
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(received->rows[rank].scale, rank);
    EXPECT_EQ(received->rows[rank].first_route, rank);
    EXPECT_EQ(received->routes[rank].expert, ExpertId{rank});
  }
  EXPECT_EQ(received->rows[1].codes, codes[1].rows(1).codes) << "own rows stay where they are";
}

TEST(ExchangeTest, PeersInAnotherStepOrLayerAreErrors) {
  for (uint32_t step : {1u, 9u}) {
    TwoRanks ranks(kTwoRankOptions);
    ASSERT_TRUE(ranks.Dispatch(0, step, step == 9 ? 2 : 3).ok());
    ASSERT_TRUE(ranks.Dispatch(1, 1, 2).ok());
    ExpectErrorFromRank(0, step == 9 ? "step is 9" : "layer is 3",
                        ranks.exchange(1).DispatchRecv().status());
  }
}

TEST(ExchangeTest, GarbageFromAPeerIsAnError) {
  for (Phase phase : {Phase::kDispatch, Phase::kCombine}) {
    TwoRanks ranks(kTwoRankOptions);
    if (phase == Phase::kCombine) ranks.DispatchBoth();
    Message garbage = ranks.transport(1).Acquire(100);
    std::fill_n(garbage.bytes().data(), 100, uint8_t{0x5A});
    ASSERT_TRUE(ranks.transport(1).Send(RankId{0}, phase, std::move(garbage)).ok());
    const std::vector<float> outputs(4 * 130);
    std::vector<float> out(2 * 130);
    if (phase == Phase::kDispatch) {
      ASSERT_TRUE(ranks.Dispatch(0).ok());
      ExpectErrorFromRank(1, "magic", ranks.exchange(0).DispatchRecv().status());
    } else {
      ASSERT_TRUE(ranks.exchange(0).CombineSend(outputs.data()).ok());
      ASSERT_EQ(ranks.exchange(0).DispatchRecv().value(), nullptr);
      ExpectErrorFromRank(1, "magic", ranks.exchange(0).CombineRecv(out.data()));
    }
  }
}

TEST(ExchangeTest, ARankThatGivesUpEndsTheOthers) {
  const ExchangeCase c = MakeCase(4, RowFormat::kInt8, RowFormat::kBf16, true);
  const auto statuses = RunLoopback(c.num_ranks, [&](Transport& transport) -> absl::Status {
    std::vector<std::vector<float>> outs;
    ExchangeCase own = c;
    if (transport.rank() == RankId{2}) own.num_layers = 1;
    const absl::Status status = RunRank(own, transport, &outs);
    return transport.rank() == RankId{2} ? absl::InternalError("out of luck") : status;
  });
  for (int rank : {0, 1, 3}) {
    EXPECT_TRUE(absl::IsUnavailable(statuses[rank])) << statuses[rank];
    ExpectErrorFromRank(2, "out of luck", statuses[rank]);
  }
}

TEST(ExchangeTest, APeerThatLeavesBeforeItReturnsRowsIsAnError) {
  TwoRanks ranks(kTwoRankOptions);
  ranks.DispatchBoth();
  const std::vector<float> outputs(4 * 130);
  std::vector<float> out(2 * 130);
  ASSERT_TRUE(ranks.exchange(0).CombineSend(outputs.data()).ok());
  ASSERT_EQ(ranks.exchange(0).DispatchRecv().value(), nullptr);
  ranks.Leave(1);
  ExpectErrorFromRank(1, "is gone", ranks.exchange(0).CombineRecv(out.data()));
}

TEST(ExchangeOptionsTest, ContradictionsAreRefusedByName) {
  EXPECT_TRUE(ValidateExchangeOptions(kTwoRankOptions).ok());
  const auto refused = [](auto edit) {
    ExchangeOptions options = kTwoRankOptions;
    edit(options);
    const absl::Status status = ValidateExchangeOptions(options);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  const auto expect = [](const std::string& text, const std::string& message) {
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  expect("hidden", refused([](auto& o) { o.hidden = 0; }));
  expect("hidden", refused([](auto& o) { o.hidden = int64_t{1} << 40; }));
  expect("max_rows", refused([](auto& o) { o.max_rows = 0; }));
  expect("top_k is 5, must be 1 to 4", refused([](auto& o) { o.top_k = 5; }));
  expect("num_experts", refused([](auto& o) { o.num_experts = 1 << 17; }));
  expect("act_bits", refused([](auto& o) { o.act_bits = 5; }));
  expect("int4 dispatch", refused([](auto& o) {
           o.dispatch = RowFormat::kInt4;
           o.act_bits = 8;
         }));
}

}  // namespace
}  // namespace ternion::comm
