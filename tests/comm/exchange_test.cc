// The exchange between ranks that are threads.
#include "comm/exchange.h"

#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "tests/comm/exchange_case.h"

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

}  // namespace
}  // namespace ternion::comm
