// What a placement makes of a routing trace.
#pragma once

#include "experts/placement.h"
#include "experts/trace.h"

namespace ternion::experts {

struct PlacementStatistics {
  // Distinct ranks other than its own that a token visits in a layer: m of B_min.
  double remote_ranks = 0;
  // The same if all experts were equally likely and none had a replica (UniformRemoteRanks).
  double uniform_remote_ranks = 0;
  // (token, expert) pairs of the busiest rank over those of the mean rank, averaged over layers:
  // layers run one after another, and each waits for its busiest rank.
  double max_over_mean_load = 0;
};

// Deals the tokens out to the ranks in equal blocks, in order, and plans every layer as the
// runtime does (PlanDispatch). `placement` has the layers and experts of `trace`.
PlacementStatistics EvaluatePlacement(const Placement& placement, const RoutingTrace& trace);

// Expected remote ranks of a token under uniform routing, contiguous experts and a random owner:
// (N - 1)/N * sum over ranks of 1 - C(E - E_rank, k) / C(E, k).
double UniformRemoteRanks(int num_experts, int top_k, int num_ranks);

}  // namespace ternion::experts
