// Placements that keep rows at home: experts that fire together share a rank, so that a token
// visits few ranks. No expert is replicated.
#pragma once

#include "experts/placement.h"
#include "experts/trace.h"

namespace ternion::experts {

// The busiest rank of a layer may work this much over the mean to save travel.
inline constexpr double kLocalMaxOverMean = 1.25;

// Every layer apart: at most ceil(experts / ranks) experts on a rank. Two starts (packed by load;
// each expert beside its companions) are improved by swaps of two experts while that lowers the
// number of distinct ranks per token of the trace and no rank's load goes past kLocalMaxOverMean
// times the mean, or past that of the packing by load where single experts are too hot for it; the
// better one is kept. Where the contiguous placement has fewer visits than both, its layer is
// improved instead, at the load that it has. The same on every machine.
Placement LocalPlacement(const RoutingTrace& trace, int num_ranks);

}  // namespace ternion::experts
