#include "experts/routing.h"

#include <algorithm>
#include <span>

namespace ternion::experts {
namespace {

using Destination = RoutingWorkspace::Destination;

bool IsIn(std::span<const RankId> ranks, RankId rank) {
  return std::binary_search(ranks.begin(), ranks.end(), rank);
}

// One of several replicas, none of them here. `turn` differs from row to row, from rank to rank and
// from expert to expert.
RankId PickReplica(std::span<const RankId> replicas, int64_t turn,
                   std::span<const Destination> chosen) {
  for (const Destination& other : chosen) {
    if (IsIn(replicas, other.rank)) return other.rank;
  }
  return replicas[turn % replicas.size()];
}

// Fills `routes` [top_k] with the row's routes, sorted by (rank, expert).
void PlanRow(const Placement& placement, int layer, RankId self, const GateChoice& choice,
             int64_t row, std::span<Destination> routes) {
  size_t first = 0, last = routes.size();  // certain ones from the front, the others at the back
  for (int j = 0; j < choice.top_k; ++j) {
    const ExpertId expert{choice.experts[row * choice.top_k + j]};
    const comm::Route route = {expert, choice.weights[row * choice.top_k + j]};
    const std::span<const RankId> replicas = placement.RanksOf(layer, expert);
    if (replicas.size() == 1) {
      routes[first++] = {replicas[0], route};
    } else if (IsIn(replicas, self)) {
      routes[first++] = {self, route};
    } else {
      routes[--last] = {self, route};
    }
  }
  for (; first < routes.size(); ++first) {
    const ExpertId expert = routes[first].route.expert;
    const int64_t turn = row + base::Index(self) + base::Index(expert);
    routes[first].rank = PickReplica(placement.RanksOf(layer, expert), turn, routes.first(first));
  }
  std::sort(routes.begin(), routes.end(), [](const Destination& a, const Destination& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.route.expert < b.route.expert;
  });
}

}  // namespace

const comm::DispatchPlan& PlanDispatch(const Placement& placement, int layer, RankId self,
                                       const GateChoice& choice, RoutingWorkspace& ws) {
  const int num_ranks = placement.num_ranks();
  const size_t num_routes = static_cast<size_t>(choice.num_rows) * choice.top_k;
  const auto begins_entry = [&](size_t i) {  // of its (row, rank)
    return i % choice.top_k == 0 || ws.routes[i].rank != ws.routes[i - 1].rank;
  };
  ws.routes.resize(num_routes);
  ws.row_next.assign(num_ranks + 1, 0);
  ws.route_next.assign(num_ranks + 1, 0);
  for (int64_t row = 0; row < choice.num_rows; ++row) {
    PlanRow(placement, layer, self, choice, row,
            std::span(ws.routes).subspan(row * choice.top_k, choice.top_k));
  }
  for (size_t i = 0; i < num_routes; ++i) {
    const int rank = base::Index(ws.routes[i].rank);
    ++ws.route_next[rank + 1];
    if (begins_entry(i)) ++ws.row_next[rank + 1];
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    ws.row_next[rank + 1] += ws.row_next[rank];
    ws.route_next[rank + 1] += ws.route_next[rank];
  }
  comm::DispatchPlan& plan = ws.plan;
  plan.rank_begin = ws.row_next;
  plan.rows.resize(ws.row_next[num_ranks]);
  plan.routes.resize(num_routes);
  for (size_t i = 0; i < num_routes; ++i) {
    const int rank = base::Index(ws.routes[i].rank);
    if (begins_entry(i)) {
      plan.rows[ws.row_next[rank]++] = {static_cast<int32_t>(i / choice.top_k), ws.route_next[rank],
                                        0};
    }
    ++plan.rows[ws.row_next[rank] - 1].num_routes;
    plan.routes[ws.route_next[rank]++] = ws.routes[i].route;
  }
  return plan;
}

}  // namespace ternion::experts
