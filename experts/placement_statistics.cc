#include "experts/placement_statistics.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/check.h"
#include "experts/routing.h"

namespace ternion::experts {
namespace {

// What all ranks' plans of one layer add up to.
class LayerTraffic {
 public:
  LayerTraffic(const Placement& placement, int layer)
      : placement_(placement), layer_(layer), loads_(placement.num_ranks(), 0) {}

  void AddRank(RankId self, const GateChoice& choice, RoutingWorkspace& workspace) {
    const comm::DispatchPlan& plan = PlanDispatch(placement_, layer_, self, choice, workspace);
    for (int rank = 0; rank < placement_.num_ranks(); ++rank) {
      for (int32_t i = plan.rank_begin[rank]; i < plan.rank_begin[rank + 1]; ++i) {
        loads_[rank] += plan.rows[i].num_routes;
        remote_rows_ += rank != base::Index(self);
      }
    }
  }
  int64_t remote_rows() const { return remote_rows_; }
  int64_t max_load() const { return *std::max_element(loads_.begin(), loads_.end()); }

 private:
  const Placement& placement_;
  const int layer_;
  std::vector<int64_t> loads_;  // [num_ranks] (token, expert) pairs
  int64_t remote_rows_ = 0;
};

}  // namespace

PlacementStatistics EvaluatePlacement(const Placement& placement, const RoutingTrace& trace) {
  const TraceShape& shape = trace.shape;
  TERNION_CHECK(placement.num_layers() == shape.num_layers &&
                placement.num_experts() == shape.num_experts);
  const int num_ranks = placement.num_ranks();
  const std::vector<float> weights(shape.num_tokens * shape.top_k, 1.0f);
  RoutingWorkspace workspace;
  int64_t remote_rows = 0, max_loads = 0;
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    LayerTraffic traffic(placement, layer);
    const auto layer_ids = trace.ids.begin() + layer * shape.num_tokens * shape.top_k;
    const std::vector<int32_t> ids(layer_ids, layer_ids + shape.num_tokens * shape.top_k);
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
      const int64_t begin = shape.num_tokens * rank / num_ranks;
      const int64_t end = shape.num_tokens * (rank + 1) / num_ranks;
      traffic.AddRank(RankId(rank),
                      {ids.data() + begin * shape.top_k, weights.data(), end - begin, shape.top_k},
                      workspace);
    }
    remote_rows += traffic.remote_rows();
    max_loads += traffic.max_load();
  }
  const double layer_tokens = static_cast<double>(shape.num_layers) * shape.num_tokens;
  return {.remote_ranks = remote_rows / layer_tokens,
          .uniform_remote_ranks = UniformRemoteRanks(shape.num_experts, shape.top_k, num_ranks),
          .max_over_mean_load = max_loads * num_ranks / (layer_tokens * shape.top_k)};
}

double UniformRemoteRanks(int num_experts, int top_k, int num_ranks) {
  double visited = 0;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    // Experts elsewhere; Contiguous puts expert e on rank floor(e * N / E).
    const int64_t begin = (rank * num_experts + num_ranks - 1) / num_ranks;
    const int64_t end = ((rank + 1) * num_experts + num_ranks - 1) / num_ranks;
    const int64_t elsewhere = num_experts - (end - begin);
    double missed = 1;  // C(elsewhere, k) / C(E, k)
    for (int64_t i = 0; i < top_k; ++i) {
      missed *= std::max<double>(0, elsewhere - i) / static_cast<double>(num_experts - i);
    }
    visited += 1 - missed;
  }
  return visited * (num_ranks - 1) / num_ranks;
}

}  // namespace ternion::experts
