#include "experts/locality.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "experts/balance.h"
#include "gtest/gtest.h"
#include "tests/experts/trace_support.h"

namespace ternion::experts {
namespace {

int EqualShare(const RoutingTrace& trace, int num_ranks) {
  return (trace.shape.num_experts + num_ranks - 1) / num_ranks;
}

TEST(LocalPlacement, RandomTracesKeepTheInvariants) {
  std::mt19937 random(4);
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const RoutingTrace trace = RandomTrace(random);
    const int num_ranks = 1 + random() % 12;
    const TraceShape& shape = trace.shape;
    const int slots = EqualShare(trace, num_ranks);
    const Placement placement = LocalPlacement(trace, num_ranks);
    ASSERT_NO_FATAL_FAILURE(ExpectWithinSlots(placement, slots));
    EXPECT_EQ(placement.ToJson(), LocalPlacement(trace, num_ranks).ToJson());
    const Placement contiguous =
        Placement::Contiguous(shape.num_layers, shape.num_experts, num_ranks);
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      for (int expert = 0; expert < shape.num_experts; ++expert) {
        EXPECT_EQ(placement.RanksOf(layer, ExpertId{expert}).size(), 1u);
      }
      EXPECT_LE(NumVisits(placement, trace, layer), NumVisits(contiguous, trace, layer));
      const std::vector<int64_t> loads = ExpertLoads(trace, layer);
      const std::vector<int> single(shape.num_experts, 1);
      const Placement packed =
          Placement::FromLayers({PackExperts(loads, single, num_ranks, slots)}, num_ranks);
      const double bound =
          std::max({kLocalMaxOverMean * shape.num_tokens * shape.top_k / num_ranks,
                    MaxRankLoad(packed, 0, loads), MaxRankLoad(contiguous, layer, loads)});
      EXPECT_LE(MaxRankLoad(placement, layer, loads), bound);
    }
    if (HasFailure()) return;
  }
}

TEST(LocalPlacement, FindsGroupsOfExperts) {
  for (int num_ranks : {2, 4, 8}) {
    SCOPED_TRACE(num_ranks);
    const RoutingTrace trace = GroupedTrace({2, 2000, 64, 6}, num_ranks, 10);
    std::vector<LayerRanks> grouped(2, LayerRanks(64));
    for (LayerRanks& layer : grouped) {
      for (int expert = 0; expert < 64; ++expert) layer[expert] = {RankId{expert % num_ranks}};
    }
    const Placement ideal = Placement::FromLayers(grouped, num_ranks);
    const Placement local = LocalPlacement(trace, num_ranks);
    for (int layer = 0; layer < 2; ++layer) {
      EXPECT_LE(NumVisits(local, trace, layer), NumVisits(ideal, trace, layer));
    }
  }
}

TEST(LocalPlacement, KeepsTheLoadWithinItsBound) {
  // Tokens would visit fewest ranks with all hot experts on one.
  const RoutingTrace trace = *ZipfTrace(9, 0.8, {2, 3000, 64, 6});
  for (int num_ranks : {2, 4}) {
    const Placement local = LocalPlacement(trace, num_ranks);
    const Placement contiguous = Placement::Contiguous(2, 64, num_ranks);
    for (int layer = 0; layer < 2; ++layer) {
      const std::vector<int64_t> loads = ExpertLoads(trace, layer);
      EXPECT_LE(MaxRankLoad(local, layer, loads), 1.25 * 3000 * 6 / num_ranks);
      EXPECT_LT(NumVisits(local, trace, layer), NumVisits(contiguous, trace, layer));
    }
  }
}

TEST(LocalPlacement, UsesEmptySlots) {
  // Three slots on each of two ranks: 0, 2 and 4 fire together, and so do 1 and 3.
  RoutingTrace trace{{1, 20, 5, 2}, {}};
  for (int i = 0; i < 20; ++i) {
    const uint16_t pairs[4][2] = {{0, 2}, {1, 3}, {2, 4}, {1, 3}};
    trace.ids.insert(trace.ids.end(), pairs[i % 4], pairs[i % 4] + 2);
  }
  EXPECT_EQ(NumVisits(LocalPlacement(trace, 2), trace, 0), 20);
}

}  // namespace
}  // namespace ternion::experts
