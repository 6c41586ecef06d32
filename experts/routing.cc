#include "experts/routing.h"

#include <algorithm>
#include <span>

#include "absl/strings/str_cat.h"

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

void SortRow(std::span<Destination> routes) {
  std::sort(routes.begin(), routes.end(), [](const Destination& a, const Destination& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.route.expert < b.route.expert;
  });
}

// Fills `routes` [top_k] with the row's routes, sorted by (rank, expert).
void PlanRow(const Placement& placement, int layer, RankId self, const GateChoice& choice,
             int64_t row, std::span<Destination> routes) {
  const int32_t source = static_cast<int32_t>(row);
  size_t first = 0, last = routes.size();  // certain ones from the front, the others at the back
  for (int j = 0; j < choice.top_k; ++j) {
    const ExpertId expert{choice.experts[row * choice.top_k + j]};
    const comm::Route route = {expert, choice.weights[row * choice.top_k + j]};
    const std::span<const RankId> replicas = placement.RanksOf(layer, expert);
    if (replicas.size() == 1) {
      routes[first++] = {replicas[0], source, route};
    } else if (IsIn(replicas, self)) {
      routes[first++] = {self, source, route};
    } else {
      routes[--last] = {self, source, route};
    }
  }
  for (; first < routes.size(); ++first) {
    const ExpertId expert = routes[first].route.expert;
    const int64_t turn = row + base::Index(self) + base::Index(expert);
    routes[first].rank = PickReplica(placement.RanksOf(layer, expert), turn, routes.first(first));
  }
  SortRow(routes);
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
  ws.routes.resize(static_cast<size_t>(choice.num_rows) * choice.top_k);
  for (int64_t row = 0; row < choice.num_rows; ++row) {
    PlanRow(placement, layer, self, choice, row,
            std::span(ws.routes).subspan(row * choice.top_k, choice.top_k));
  }
  return GroupByRank(placement.num_ranks(), ws);
}

absl::StatusOr<const comm::DispatchPlan*> PlanFanOut(const LayerRanks& seats, int num_seats,
                                                     const comm::ReceivedRows& rows,
                                                     RoutingWorkspace& ws) {
  ws.routes.clear();
  for (size_t row = 0; row < rows.rows.size(); ++row) {
    const size_t begin = ws.routes.size();
    for (int32_t j = 0; j < rows.rows[row].num_routes; ++j) {
      const comm::Route& route = rows.routes[rows.rows[row].first_route + j];
      const size_t expert = base::Index(route.expert);
      if (expert >= seats.size() || seats[expert].empty()) {
        return absl::InvalidArgumentError(absl::StrCat("a peer sent rows for expert ", expert,
                                                       ", which is not placed on this node"));
      }
      const RankId seat = seats[expert][(row + expert) % seats[expert].size()];
      ws.routes.push_back({seat, static_cast<int32_t>(row), route});
    }
    SortRow(std::span(ws.routes).subspan(begin));
  }
  return &GroupByRank(num_seats, ws);
}

}  // namespace ternion::experts
