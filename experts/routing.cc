#include "experts/routing.h"

#include <algorithm>
#include <vector>

namespace ternion::experts {
namespace {

// One row's routes with their destinations.
struct Destination {
  RankId rank;
  comm::Route route;
};

RankId PickReplica(std::span<const RankId> replicas, RankId self, int64_t row,
                   const std::vector<Destination>& chosen) {
  if (replicas.size() == 1) return replicas[0];
  if (std::binary_search(replicas.begin(), replicas.end(), self)) return self;
  for (const Destination& other : chosen) {
    if (std::binary_search(replicas.begin(), replicas.end(), other.rank)) return other.rank;
  }
  return replicas[(row + base::Index(self)) % replicas.size()];
}

// Fills `row_routes` with the row's routes, sorted by (rank, expert).
void PlanRow(const Placement& placement, int layer, RankId self, const GateChoice& choice,
             int64_t row, std::vector<Destination>& row_routes) {
  row_routes.clear();
  for (int j = 0; j < choice.top_k; ++j) {
    const ExpertId expert{choice.experts[row * choice.top_k + j]};
    const float weight = choice.weights[row * choice.top_k + j];
    const RankId rank = PickReplica(placement.RanksOf(layer, expert), self, row, row_routes);
    row_routes.push_back({rank, {expert, weight}});
  }
  std::sort(row_routes.begin(), row_routes.end(), [](const Destination& a, const Destination& b) {
    return a.rank != b.rank ? a.rank < b.rank : a.route.expert < b.route.expert;
  });
}

}  // namespace

void PlanDispatch(const Placement& placement, int layer, RankId self, const GateChoice& choice,
                  comm::DispatchPlan& plan) {
  const int num_ranks = placement.num_ranks();
  const size_t num_routes = static_cast<size_t>(choice.num_rows) * choice.top_k;
  thread_local std::vector<Destination> row_routes;
  thread_local std::vector<Destination> all_routes;  // [num_rows, top_k], each row sorted
  thread_local std::vector<int32_t> route_next;      // per rank: where its next route goes
  thread_local std::vector<int32_t> row_next;        // per rank: where its next row goes
  all_routes.clear();
  row_next.assign(num_ranks + 1, 0);
  route_next.assign(num_ranks + 1, 0);
  for (int64_t row = 0; row < choice.num_rows; ++row) {
    PlanRow(placement, layer, self, choice, row, row_routes);
    for (size_t j = 0; j < row_routes.size(); ++j) {
      const int rank = base::Index(row_routes[j].rank);
      ++route_next[rank + 1];
      if (j == 0 || row_routes[j].rank != row_routes[j - 1].rank) ++row_next[rank + 1];
    }
    all_routes.insert(all_routes.end(), row_routes.begin(), row_routes.end());
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    row_next[rank + 1] += row_next[rank];
    route_next[rank + 1] += route_next[rank];
  }
  plan.rank_begin = row_next;
  plan.rows.resize(row_next[num_ranks]);
  plan.routes.resize(num_routes);
  for (size_t i = 0; i < num_routes; ++i) {
    const int rank = base::Index(all_routes[i].rank);
    const bool same_row = i % choice.top_k != 0 && all_routes[i].rank == all_routes[i - 1].rank;
    if (!same_row) {
      plan.rows[row_next[rank]++] = {static_cast<int32_t>(i / choice.top_k), route_next[rank], 0};
    }
    ++plan.rows[row_next[rank] - 1].num_routes;
    plan.routes[route_next[rank]++] = all_routes[i].route;
  }
}

}  // namespace ternion::experts
