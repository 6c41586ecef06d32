#include "experts/routing.h"

#include <algorithm>
#include <span>

#include "absl/strings/str_cat.h"

namespace ternion::experts {
namespace {

using Destination = RoutingWorkspace::Destination;

constexpr RankId kUndecided{-1};

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

// Sets the ranks of one row's routes and sorts these by (rank, expert). `replicas_of` an expert:
// ascending ranks, at least one.
template <typename ReplicasOf>
void PlaceRow(std::span<Destination> routes, RankId self, ReplicasOf replicas_of) {
  for (Destination& route : routes) {
    const std::span<const RankId> replicas = replicas_of(route.route.expert);
    route.rank = replicas.size() == 1 ? replicas[0] : IsIn(replicas, self) ? self : kUndecided;
  }
  const auto certain = std::partition(routes.begin(), routes.end(), [](const Destination& route) {
    return route.rank != kUndecided;
  });
  for (size_t i = certain - routes.begin(); i < routes.size(); ++i) {
    Destination& route = routes[i];
    const int64_t turn = route.row + base::Index(self) + base::Index(route.route.expert);
    route.rank = PickReplica(replicas_of(route.route.expert), turn, routes.first(i));
  }
  std::sort(routes.begin(), routes.end(), [](const Destination& a, const Destination& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.route.expert < b.route.expert;
  });
}

// The plan from ws.routes.
const comm::DispatchPlan& GroupByRank(int num_ranks, RoutingWorkspace& ws) {
  const size_t num_routes = ws.routes.size();
  const auto begins_entry = [&](size_t i) {  // of its (row, rank)
    return i == 0 || ws.routes[i].row != ws.routes[i - 1].row ||
           ws.routes[i].rank != ws.routes[i - 1].rank;
  };
  ws.row_next.assign(num_ranks + 1, 0);
  ws.route_next.assign(num_ranks + 1, 0);
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
      plan.rows[ws.row_next[rank]++] = {ws.routes[i].row, ws.route_next[rank], 0};
    }
    ++plan.rows[ws.row_next[rank] - 1].num_routes;
    plan.routes[ws.route_next[rank]++] = ws.routes[i].route;
  }
  return plan;
}

}  // namespace

const comm::DispatchPlan& PlanDispatch(const Placement& placement, int layer, RankId self,
                                       const GateChoice& choice, RoutingWorkspace& ws) {
  ws.routes.clear();
  for (int32_t row = 0; row < choice.num_rows; ++row) {
    for (int64_t j = int64_t{row} * choice.top_k; j < int64_t{row + 1} * choice.top_k; ++j) {
      ws.routes.push_back({self, row, {ExpertId{choice.experts[j]}, choice.weights[j]}});
    }
    PlaceRow(std::span(ws.routes).last(choice.top_k), self,
             [&](ExpertId expert) { return placement.RanksOf(layer, expert); });
  }
  return GroupByRank(placement.num_ranks(), ws);
}

absl::StatusOr<const comm::DispatchPlan*> PlanFanOut(const LayerRanks& seats, int num_seats,
                                                     RankId self, const comm::ReceivedRows& rows,
                                                     RoutingWorkspace& ws) {
  ws.routes.clear();
  for (size_t row = 0; row < rows.rows.size(); ++row) {
    const comm::ReceivedRow& received = rows.rows[row];
    for (int32_t j = 0; j < received.num_routes; ++j) {
      const comm::Route& route = rows.routes[received.first_route + j];
      const size_t expert = base::Index(route.expert);
      if (expert >= seats.size() || seats[expert].empty()) {
        return absl::InvalidArgumentError(absl::StrCat("a peer sent rows for expert ", expert,
                                                       ", which is not placed on this node"));
      }
      ws.routes.push_back({self, static_cast<int32_t>(row), route});
    }
    PlaceRow(std::span(ws.routes).last(received.num_routes), self,
             [&](ExpertId expert) { return std::span(seats[base::Index(expert)]); });
  }
  return &GroupByRank(num_seats, ws);
}

}  // namespace ternion::experts
