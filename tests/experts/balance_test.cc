#include "experts/balance.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/experts/trace_support.h"

namespace ternion::experts {
namespace {

TEST(ExpertLoads, CountsTokens) {
  const RoutingTrace trace{{2, 3, 4, 2}, {0, 1, 0, 2, 0, 3, 1, 2, 1, 2, 2, 3}};
  EXPECT_EQ(ExpertLoads(trace, 0), std::vector<int64_t>({3, 1, 1, 1}));
  EXPECT_EQ(ExpertLoads(trace, 1), std::vector<int64_t>({0, 2, 3, 1}));
}

TEST(BalancedSlots, AShareAndOneForEveryEightBegun) {
  EXPECT_EQ(BalancedSlots(256, 32), 9);
  EXPECT_EQ(BalancedSlots(256, 8), 36);
  EXPECT_EQ(BalancedSlots(16, 4), 5);
  EXPECT_EQ(BalancedSlots(10, 4), 4);
  EXPECT_EQ(BalancedSlots(16, 1), 16);  // nothing to replicate on one rank
  EXPECT_EQ(BalancedSlots(3, 8), 2);
  EXPECT_EQ(BalancedSlots(1, 8), 1);
}

TEST(CountReplicas, TheHottestPerReplicaGetsTheNext) {
  const std::vector<int64_t> loads = {90, 10, 40, 0};
  EXPECT_EQ(CountReplicas(loads, 4, 4), std::vector<int>({1, 1, 1, 1}));
  EXPECT_EQ(CountReplicas(loads, 4, 5), std::vector<int>({2, 1, 1, 1}));
  EXPECT_EQ(CountReplicas(loads, 4, 6), std::vector<int>({3, 1, 1, 1}));  // 45 against 40
  EXPECT_EQ(CountReplicas(loads, 4, 7), std::vector<int>({3, 1, 2, 1}));  // 30 against 40
  EXPECT_EQ(CountReplicas(loads, 2, 7), std::vector<int>({2, 2, 2, 1}));  // one rank holds one
  EXPECT_EQ(CountReplicas(loads, 2, 99), std::vector<int>({2, 2, 2, 2}));
}

TEST(PackExperts, EveryRankGetsItsShareOfEqualLoads) {
  const std::vector<int64_t> loads(8, 30);
  for (int num_ranks : {1, 2, 4, 8}) {
    SCOPED_TRACE(num_ranks);
    const int slots = BalancedSlots(8, num_ranks);
    const std::vector<int> replicas = CountReplicas(loads, num_ranks, slots * num_ranks);
    const Placement placement =
        Placement::FromLayers({PackExperts(loads, replicas, num_ranks, slots)}, num_ranks);
    EXPECT_DOUBLE_EQ(MaxRankLoad(placement, 0, loads), 8 * 30.0 / num_ranks);
  }
}

TEST(PackExperts, TheHotExpertIsSharedAndTheRestFillsUp) {
  // Expert 0 has half of the load. Alone on a rank it would be twice the mean.
  const std::vector<int64_t> loads = {60, 10, 10, 10, 10, 10, 10};
  const std::vector<int> replicas = CountReplicas(loads, 4, 12);
  const Placement placement = Placement::FromLayers({PackExperts(loads, replicas, 4, 3)}, 4);
  EXPECT_EQ(placement.RanksOf(0, ExpertId{0}).size(), 4u);
  EXPECT_LE(MaxRankLoad(placement, 0, loads), 1.2 * 30);
}

TEST(BalancedPlacement, RandomTracesKeepTheInvariants) {
  std::mt19937 random(3);
  for (int round = 0; round < 400; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const RoutingTrace trace = RandomTrace(random);
    const int num_ranks = 1 + random() % 12;
    const TraceShape& shape = trace.shape;
    const Placement placement = BalancedPlacement(trace, num_ranks);
    ASSERT_NO_FATAL_FAILURE(
        ExpectWithinSlots(placement, BalancedSlots(shape.num_experts, num_ranks)));
    EXPECT_EQ(placement.ToJson(), BalancedPlacement(trace, num_ranks).ToJson());
    const Placement contiguous =
        Placement::Contiguous(shape.num_layers, shape.num_experts, num_ranks);
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      const std::vector<int64_t> loads = ExpertLoads(trace, layer);
      double granule = 0;  // the largest share that is placed as a whole
      for (int expert = 0; expert < shape.num_experts; ++expert) {
        const double replicas = placement.RanksOf(layer, ExpertId{expert}).size();
        granule = std::max(granule, loads[expert] / replicas);
      }
      const double balanced = MaxRankLoad(placement, layer, loads);
      EXPECT_LE(balanced, MaxRankLoad(contiguous, layer, loads) + granule);
      const double mean = double(shape.num_tokens) * shape.top_k / num_ranks;
      EXPECT_LE(balanced, mean + granule + 1e-9);
    }
    if (HasFailure()) return;
  }
}

TEST(BalancedPlacement, SkewedLoadsComeOutEven) {
  const RoutingTrace trace = *ZipfTrace(5, 1, {2, 4000, 64, 4});
  for (int num_ranks : {2, 4, 8, 16}) {
    const Placement placement = BalancedPlacement(trace, num_ranks);
    for (int layer = 0; layer < 2; ++layer) {
      const double mean = 4000 * 4.0 / num_ranks;
      EXPECT_LE(MaxRankLoad(placement, layer, ExpertLoads(trace, layer)), 1.02 * mean) << num_ranks;
    }
  }
}

TEST(BalancedPlacement, LayersHaveTheirOwnHotExperts) {
  const RoutingTrace trace{{2, 4, 4, 1}, {0, 0, 0, 1, 3, 3, 3, 2}};
  const Placement placement = BalancedPlacement(trace, 2);
  EXPECT_EQ(placement.RanksOf(0, ExpertId{0}).size(), 2u);
  EXPECT_EQ(placement.RanksOf(1, ExpertId{3}).size(), 2u);
  EXPECT_EQ(placement.RanksOf(1, ExpertId{0}).size(), 1u);
}

}  // namespace
}  // namespace ternion::experts
