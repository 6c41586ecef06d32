// Placements that even out the ranks' work: hot experts on several ranks, then all packed by load.
//
// The idea is that of EPLB (DeepSeek, 2025): replicate, then pack, as pure functions of counts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "experts/placement.h"
#include "experts/trace.h"

namespace ternion::experts {

// How many tokens took each expert of `layer`, [num_experts].
std::vector<int64_t> ExpertLoads(const RoutingTrace& trace, int layer);

// Experts that a rank holds at most in a balanced layer: an equal share of them and, for replicas,
// one more for every eight begun.
int BalancedSlots(int num_experts, int num_ranks);

// How many replicas each expert gets, [num_experts], 1 to num_ranks: `num_replicas` in all (or as
// many as there can be), each next one to the expert with the highest load per replica.
std::vector<int> CountReplicas(std::span<const int64_t> loads, int num_ranks, int num_replicas);

// Experts by falling load per replica, each on the least loaded ranks that have one of their
// `slots` free; never twice on a rank. An expert for which fewer ranks are free than it has
// replicas goes to those. num_ranks * slots >= sum of `replicas`.
LayerRanks PackExperts(std::span<const int64_t> loads, std::span<const int> replicas, int num_ranks,
                       int slots);

// Every layer by its own loads. The same on every machine.
Placement BalancedPlacement(const RoutingTrace& trace, int num_ranks);

}  // namespace ternion::experts
