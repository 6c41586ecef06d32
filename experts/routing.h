// From chosen experts to a dispatch plan.
#pragma once

#include <cstdint>

#include "comm/exchange.h"
#include "experts/placement.h"

namespace ternion::experts {

// The gate's choice for a batch of rows.
struct GateChoice {
  const int32_t* experts = nullptr;  // [num_rows, top_k], distinct in a row
  const float* weights = nullptr;    // [num_rows, top_k]
  int64_t num_rows = 0;
  int top_k = 0;
};

// Picks one replica for every chosen expert and groups the rows by destination, one entry per (row,
// rank). A replica on `self` wins, then one on a rank the row goes to anyway, then one by turns, so
// that replicas share the load. A pure function of its arguments; `plan` keeps its capacity between
// calls.
void PlanDispatch(const Placement& placement, int layer, RankId self, const GateChoice& choice,
                  comm::DispatchPlan& plan);

}  // namespace ternion::experts
