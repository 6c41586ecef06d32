#include "experts/placement_statistics.h"

#include <cmath>
#include <random>
#include <set>

#include "experts/balance.h"
#include "gtest/gtest.h"
#include "tests/experts/trace_support.h"

namespace ternion::experts {
namespace {

TEST(UniformRemoteRanks, WorkedCases) {
  // docs: H=7168, E=256, k=8, N=16.
  EXPECT_NEAR(UniformRemoteRanks(256, 8, 16), 6.12, 0.005);
  EXPECT_DOUBLE_EQ(UniformRemoteRanks(8, 1, 1), 0);
  EXPECT_DOUBLE_EQ(UniformRemoteRanks(8, 8, 4), 3);     // every rank is visited
  EXPECT_DOUBLE_EQ(UniformRemoteRanks(8, 1, 4), 0.75);  // one rank, a quarter of them its own
  EXPECT_DOUBLE_EQ(UniformRemoteRanks(2, 1, 4), 0.75);  // ranks without experts are not visited
  // 3 experts on 2 ranks (2 and 1), k = 2: both ranks but for the pair on the first.
  EXPECT_NEAR(UniformRemoteRanks(3, 2, 2), (1 + 2.0 / 3) / 2, 1e-12);
}

TEST(EvaluatePlacement, ByHand) {
  // Two tokens of rank 0, two of rank 1; experts 0 and 1 on rank 0, 2 and 3 on rank 1.
  const RoutingTrace trace{{1, 4, 4, 2}, {0, 1, 1, 2, 0, 1, 0, 3}};
  const PlacementStatistics stats = EvaluatePlacement(Placement::Contiguous(1, 4, 2), trace);
  EXPECT_DOUBLE_EQ(stats.remote_ranks, 3 / 4.0);
  EXPECT_DOUBLE_EQ(stats.max_over_mean_load, 6 / 4.0);
  EXPECT_DOUBLE_EQ(stats.uniform_remote_ranks, UniformRemoteRanks(4, 2, 2));
}

TEST(EvaluatePlacement, LoadIsAveragedOverLayers) {
  // All on rank 0 in the first layer, all on rank 1 in the second: every layer waits.
  const RoutingTrace trace{{2, 2, 2, 1}, {0, 0, 1, 1}};
  const PlacementStatistics stats = EvaluatePlacement(Placement::Contiguous(2, 2, 2), trace);
  EXPECT_DOUBLE_EQ(stats.max_over_mean_load, 2);
  EXPECT_DOUBLE_EQ(stats.remote_ranks, 0.5);
}

TEST(EvaluatePlacement, UniformRoutingMeetsThePrediction) {
  const RoutingTrace trace = *UniformTrace(2, {2, 20000, 30, 4});
  for (int num_ranks : {1, 2, 4, 7, 40}) {
    const PlacementStatistics stats =
        EvaluatePlacement(Placement::Contiguous(2, 30, num_ranks), trace);
    EXPECT_NEAR(stats.remote_ranks, stats.uniform_remote_ranks, 0.02) << num_ranks;
  }
}

TEST(EvaluatePlacement, ReplicasSpreadTheLoadAsPlanned) {
  const RoutingTrace trace = *ZipfTrace(8, 1, {2, 8000, 32, 4});
  for (int num_ranks : {2, 4, 8}) {
    const PlacementStatistics even = EvaluatePlacement(BalancedPlacement(trace, num_ranks), trace);
    const PlacementStatistics contiguous =
        EvaluatePlacement(Placement::Contiguous(2, 32, num_ranks), trace);
    EXPECT_LT(even.max_over_mean_load, 1.15) << num_ranks;
    EXPECT_LT(even.max_over_mean_load, contiguous.max_over_mean_load);
    EXPECT_LT(even.remote_ranks, contiguous.remote_ranks);
  }
}

TEST(EvaluatePlacement, RandomTracesStayInRange) {
  std::mt19937 random(6);
  for (int round = 0; round < 200; ++round) {
    const RoutingTrace trace = RandomTrace(random);
    const int num_ranks = 1 + random() % 12;
    const PlacementStatistics stats = EvaluatePlacement(BalancedPlacement(trace, num_ranks), trace);
    EXPECT_GE(stats.remote_ranks, 0);
    EXPECT_LE(stats.remote_ranks, std::min(num_ranks - 1, trace.shape.top_k));
    EXPECT_GE(stats.max_over_mean_load, 1 - 1e-12);
    EXPECT_LE(stats.max_over_mean_load, num_ranks + 1e-12);
  }
}

}  // namespace
}  // namespace ternion::experts
