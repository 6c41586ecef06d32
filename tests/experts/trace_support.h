// Traces and placements that the tests of placements share.
#pragma once

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "experts/placement.h"
#include "experts/trace.h"
#include "gtest/gtest.h"

namespace ternion::experts {

// A trace of a random odd shape: even or skewed, and at times with experts that nobody chose.
inline RoutingTrace RandomTrace(std::mt19937& random) {
  const int num_experts = 1 + random() % 24;
  const TraceShape shape{.num_layers = 1 + static_cast<int>(random() % 3),
                         .num_tokens = 1 + static_cast<int64_t>(random() % 120),
                         .num_experts = num_experts,
                         .top_k = 1 + static_cast<int>(random() % std::min(num_experts, 8))};
  RoutingTrace trace = *ZipfTrace(random(), random() % 4 * 0.5, shape);
  if (random() % 3 == 0) trace.shape.num_experts += 5;
  return trace;
}

// Tokens whose experts come from one of `num_groups` groups of experts, with one in `stray` from
// anywhere. Expert e is in group e % num_groups: no placement in order sees them.
inline RoutingTrace GroupedTrace(const TraceShape& shape, int num_groups, int stray) {
  std::mt19937 random(17);
  RoutingTrace trace{shape, {}};
  const int group_size = shape.num_experts / num_groups;
  for (int64_t i = 0; i < shape.num_layers * shape.num_tokens; ++i) {
    const int group = random() % num_groups;
    std::set<uint16_t> ids;
    while (static_cast<int>(ids.size()) < shape.top_k) {
      const bool strays = random() % stray == 0;
      ids.insert(strays ? random() % shape.num_experts
                        : group + num_groups * (random() % group_size));
    }
    trace.ids.insert(trace.ids.end(), ids.begin(), ids.end());
  }
  return trace;
}

// Most (token, expert) pairs on a rank when replicas share equally.
inline double MaxRankLoad(const Placement& placement, int layer,
                          const std::vector<int64_t>& loads) {
  std::vector<double> rank_loads(placement.num_ranks(), 0);
  for (int expert = 0; expert < placement.num_experts(); ++expert) {
    const auto ranks = placement.RanksOf(layer, ExpertId{expert});
    for (RankId rank : ranks) rank_loads[base::Index(rank)] += double(loads[expert]) / ranks.size();
  }
  return *std::max_element(rank_loads.begin(), rank_loads.end());
}

// Distinct ranks per token of `layer`, summed over tokens; no replicas.
inline int64_t NumVisits(const Placement& placement, const RoutingTrace& trace, int layer) {
  int64_t visits = 0;
  for (int64_t token = 0; token < trace.shape.num_tokens; ++token) {
    std::set<RankId> ranks;
    for (uint16_t id : trace.ExpertsOf(layer, token)) {
      ranks.insert(placement.RanksOf(layer, ExpertId{id})[0]);
    }
    visits += static_cast<int64_t>(ranks.size());
  }
  return visits;
}

// Every expert on distinct ranks that exist, and no rank with more than `slots` experts.
inline void ExpectWithinSlots(const Placement& placement, int slots) {
  for (int layer = 0; layer < placement.num_layers(); ++layer) {
    for (int expert = 0; expert < placement.num_experts(); ++expert) {
      const auto ranks = placement.RanksOf(layer, ExpertId{expert});
      ASSERT_FALSE(ranks.empty());
      for (size_t i = 1; i < ranks.size(); ++i) ASSERT_LT(ranks[i - 1], ranks[i]);
      ASSERT_GE(ranks.front(), RankId{0});
      ASSERT_LT(ranks.back(), RankId{placement.num_ranks()});
    }
    for (int rank = 0; rank < placement.num_ranks(); ++rank) {
      ASSERT_LE(placement.ExpertsOf(layer, RankId{rank}).size(), static_cast<size_t>(slots));
    }
  }
}

}  // namespace ternion::experts
