// From chosen experts to a dispatch plan.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
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

// A plan and the scratch to make it; keeps its capacity from call to call.
struct RoutingWorkspace {
  // One route of a row, with its destination.
  struct Destination {
    RankId rank;
    int32_t row = 0;
    comm::Route route;
  };
  comm::DispatchPlan plan;
  std::vector<Destination> routes;  // by row, each row sorted by (rank, expert)
  std::vector<int32_t> route_next;  // per rank: where its next route goes
  std::vector<int32_t> row_next;    // per rank: where its next row goes
};

// Picks one replica for every chosen expert and groups the rows by destination, one entry per (row,
// rank). A replica on `self` wins. Experts with one holder come before those with several, which
// go to a rank that the row visits anyway if they can, and by turns if not, so that replicas share
// the load. Returns workspace.plan, which follows from the other arguments alone.
const comm::DispatchPlan& PlanDispatch(const Placement& placement, int layer, RankId self,
                                       const GateChoice& choice, RoutingWorkspace& workspace);

// Where rows that arrived at seat `self` of a node go inside it, by the same rules. `seats`:
// [expert] the seats that hold it, ascending, of `num_seats`. InvalidArgument names an expert that
// has none.
absl::StatusOr<const comm::DispatchPlan*> PlanFanOut(const LayerRanks& seats, int num_seats,
                                                     RankId self, const comm::ReceivedRows& rows,
                                                     RoutingWorkspace& workspace);

}  // namespace ternion::experts
