#include "experts/balance.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/checked.h"

namespace ternion::experts {
namespace {

constexpr int kSlotsPerSpare = 8;

}  // namespace

std::vector<int64_t> ExpertLoads(const RoutingTrace& trace, int layer) {
  std::vector<int64_t> loads(trace.shape.num_experts, 0);
  for (int64_t token = 0; token < trace.shape.num_tokens; ++token) {
    for (uint16_t id : trace.ExpertsOf(layer, token)) ++loads[id];
  }
  return loads;
}

int BalancedSlots(int num_experts, int num_ranks) {
  const int64_t share = base::CeilDiv(num_experts, num_ranks);
  return static_cast<int>(
      std::min<int64_t>(num_experts, share + base::CeilDiv(share, kSlotsPerSpare)));
}

std::vector<int> CountReplicas(std::span<const int64_t> loads, int num_ranks, int num_replicas) {
  std::vector<int> replicas(loads.size(), 1);
  // Load per replica as a fraction, compared without rounding; the lower id wins a tie.
  const auto cooler = [&](int a, int b) {
    if (replicas[a] == num_ranks || replicas[b] == num_ranks) {
      return replicas[a] == num_ranks && replicas[b] != num_ranks;
    }
    const int64_t left = loads[a] * replicas[b], right = loads[b] * replicas[a];
    return left != right ? left < right : a > b;
  };
  std::vector<int> heap(loads.size());
  std::iota(heap.begin(), heap.end(), 0);
  std::make_heap(heap.begin(), heap.end(), cooler);
  for (int left = num_replicas - static_cast<int>(loads.size()); left > 0; --left) {
    std::pop_heap(heap.begin(), heap.end(), cooler);
    if (replicas[heap.back()] == num_ranks) break;  // and so are all others
    ++replicas[heap.back()];
    std::push_heap(heap.begin(), heap.end(), cooler);
  }
  return replicas;
}

LayerRanks PackExperts(std::span<const int64_t> loads, std::span<const int> replicas, int num_ranks,
                       int slots) {
  struct Bin {
    double load = 0;
    int num_experts = 0;
    RankId rank{};
  };
  const auto share = [&](int expert) { return double(loads[expert]) / replicas[expert]; };
  std::vector<int> order(loads.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return share(a) > share(b); });

  std::vector<Bin> bins(num_ranks);  // that have a slot free
  for (int rank = 0; rank < num_ranks; ++rank) bins[rank].rank = RankId{rank};
  LayerRanks placed(loads.size());
  for (int expert : order) {
    TERNION_CHECK(!bins.empty());
    std::sort(bins.begin(), bins.end(), [](const Bin& a, const Bin& b) {
      return a.load != b.load ? a.load < b.load : a.rank < b.rank;
    });
    const size_t count = std::min<size_t>(replicas[expert], bins.size());
    for (Bin& bin : std::span(bins).first(count)) {
      bin.load += double(loads[expert]) / count;
      ++bin.num_experts;
      placed[expert].push_back(bin.rank);
    }
    std::sort(placed[expert].begin(), placed[expert].end());
    std::erase_if(bins, [&](const Bin& bin) { return bin.num_experts == slots; });
  }
  return placed;
}

Placement BalancedPlacement(const RoutingTrace& trace, int num_ranks) {
  const int slots = BalancedSlots(trace.shape.num_experts, num_ranks);
  std::vector<LayerRanks> layers;
  for (int layer = 0; layer < trace.shape.num_layers; ++layer) {
    const std::vector<int64_t> loads = ExpertLoads(trace, layer);
    const std::vector<int> replicas = CountReplicas(loads, num_ranks, num_ranks * slots);
    layers.push_back(PackExperts(loads, replicas, num_ranks, slots));
  }
  return Placement::FromLayers(std::move(layers), num_ranks);
}

}  // namespace ternion::experts
