#include "experts/locality.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "base/checked.h"
#include "experts/balance.h"

namespace ternion::experts {
namespace {

// Swapping ends with the first round over all experts that saves less than this share of visits.
constexpr double kLeastSaving = 0.001;

// The tokens of one layer, both ways round.
struct LayerTokens {
  LayerTokens(const RoutingTrace& trace, int layer) : top_k(trace.shape.top_k) {
    const int64_t size = trace.shape.num_tokens * top_k;
    experts = std::span(trace.ids).subspan(layer * size, size);
    loads = ExpertLoads(trace, layer);
    begin.assign(1, 0);
    for (int64_t load : loads) begin.push_back(begin.back() + load);
    tokens.resize(size);
    std::vector<int64_t> next = begin;
    for (int64_t i = 0; i < size; ++i) tokens[next[experts[i]]++] = static_cast<int32_t>(i / top_k);
  }

  std::span<const uint16_t> ExpertsOf(int32_t token) const {
    return experts.subspan(int64_t{token} * top_k, top_k);
  }
  std::span<const int32_t> TokensOf(int expert) const {
    return std::span(tokens).subspan(begin[expert], loads[expert]);
  }
  int64_t num_tokens() const { return static_cast<int64_t>(experts.size()) / top_k; }

  const int top_k;
  std::span<const uint16_t> experts;  // [num_tokens, top_k]
  std::vector<int64_t> loads;         // [num_experts]
  std::vector<int64_t> begin;         // [num_experts + 1] into `tokens`
  std::vector<int32_t> tokens;        // by expert, ascending
};

// A partition of a layer's experts, with what a move of each would change in the number of visits
// (distinct ranks, summed over tokens). Kernighan and Lin's swaps, with Fiduccia and Mattheyses'
// gains of a hypergraph: tokens are its edges.
class Partition {
 public:
  // `rank_of` [num_experts], at most `slots` on a rank. Slots left empty count as experts that no
  // token takes, so that a swap with one is a move.
  Partition(const LayerTokens& tokens, std::vector<int> rank_of, int num_ranks, int slots)
      : tokens_(&tokens),
        num_ranks_(num_ranks),
        rank_of_(std::move(rank_of)),
        rank_loads_(num_ranks, 0),
        experts_of_(tokens.num_tokens() * num_ranks, 0) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      const auto taken = std::count(rank_of_.begin(), rank_of_.begin() + tokens.loads.size(), rank);
      rank_of_.insert(rank_of_.end(), slots - taken, rank);
    }
    alone_.resize(rank_of_.size());
    newcomer_.resize(rank_of_.size() * num_ranks);
    overlap_.resize(rank_of_.size());
    for (size_t expert = 0; expert < tokens.loads.size(); ++expert) {
      rank_loads_[rank_of_[expert]] += tokens.loads[expert];
    }
    for (int32_t token = 0; token < tokens.num_tokens(); ++token) {
      for (uint16_t expert : tokens.ExpertsOf(token)) ++Count(token, rank_of_[expert]);
      for (int rank = 0; rank < num_ranks; ++rank) AddGains(token, rank, 1);
    }
    num_visits_ =
        std::count_if(experts_of_.begin(), experts_of_.end(), [](int n) { return n > 0; });
  }

  int64_t num_visits() const { return num_visits_; }
  int64_t max_load() const { return *std::max_element(rank_loads_.begin(), rank_loads_.end()); }
  const std::vector<int>& rank_of() const { return rank_of_; }

  // Swaps experts, each in turn with its best partner on another rank, while that saves visits.
  void Improve(int64_t max_load) {
    int64_t saved;
    do {
      saved = 0;
      for (int a = 0; a < static_cast<int>(rank_of_.size()); ++a) {
        const Partner best = BestPartner(a, max_load);
        if (best.gain > 0) Swap(a, best.expert);
        saved += best.gain;
      }
      num_visits_ -= saved;
    } while (saved > kLeastSaving * num_visits_);
  }

 private:
  struct Partner {
    int expert = -1;
    int64_t gain = 0;  // visits saved by changing places
  };

  uint16_t& Count(int32_t token, int rank) {
    return experts_of_[int64_t{token} * num_ranks_ + rank];
  }
  int64_t LoadOf(int expert) const {
    return expert < static_cast<int>(tokens_->loads.size()) ? tokens_->loads[expert] : 0;
  }
  std::span<const int32_t> TokensOf(int expert) const {
    if (expert >= static_cast<int>(tokens_->loads.size())) return {};
    return tokens_->TokensOf(expert);
  }
  // Visits saved by moving `expert` to `rank`, all others staying.
  int64_t Gain(int expert, int rank) const {
    return alone_[expert] - newcomer_[int64_t{expert} * num_ranks_ + rank];
  }

  // Adds (sign 1) or takes back (-1) what `token` says of `rank`.
  void AddGains(int32_t token, int rank, int sign) {
    const int count = Count(token, rank);
    if (count > 1) return;
    for (uint16_t expert : tokens_->ExpertsOf(token)) {
      if (count == 0) newcomer_[int64_t{expert} * num_ranks_ + rank] += sign;
      if (count == 1 && rank_of_[expert] == rank) alone_[expert] += sign;
    }
  }

  // overlap_[b]: what Gain(a) + Gain(b) count too much for tokens with both, which a swap of the
  // two does not change.
  void CountOverlap(int a) {
    std::fill(overlap_.begin(), overlap_.end(), 0);
    for (int32_t token : TokensOf(a)) {
      const int alone = Count(token, rank_of_[a]) == 1;
      for (uint16_t b : tokens_->ExpertsOf(token)) {
        overlap_[b] += alone + (Count(token, rank_of_[b]) == 1);
      }
    }
  }

  // Whom `a` should change places with, within the load; gain 0 when no swap saves a visit.
  Partner BestPartner(int a, int64_t max_load) {
    CountOverlap(a);
    const int from = rank_of_[a];
    Partner best;
    for (int b = 0; b < static_cast<int>(rank_of_.size()); ++b) {
      const int to = rank_of_[b];
      const int64_t more = LoadOf(a) - LoadOf(b);  // for `to`
      if (to == from || rank_loads_[to] + more > max_load || rank_loads_[from] - more > max_load) {
        continue;
      }
      const int64_t gain = Gain(a, to) + Gain(b, from) - overlap_[b];
      if (gain > best.gain) best = {b, gain};
    }
    return best;
  }

  void Move(int expert, int to) {
    const int from = std::exchange(rank_of_[expert], to);
    rank_loads_[from] -= LoadOf(expert);
    rank_loads_[to] += LoadOf(expert);
    for (int32_t token : TokensOf(expert)) {
      rank_of_[expert] = from;
      AddGains(token, from, -1);
      AddGains(token, to, -1);
      rank_of_[expert] = to;
      --Count(token, from);
      ++Count(token, to);
      AddGains(token, from, 1);
      AddGains(token, to, 1);
    }
  }
  void Swap(int a, int b) {
    const int rank = rank_of_[a];
    Move(a, rank_of_[b]);
    Move(b, rank);
  }

  const LayerTokens* tokens_;
  int num_ranks_;
  std::vector<int> rank_of_;         // [num_experts, then one for each slot left empty]
  std::vector<int64_t> rank_loads_;  // [num_ranks]
  int64_t num_visits_ = 0;
  std::vector<uint16_t> experts_of_;  // [num_tokens, num_ranks] experts of the token on the rank
  std::vector<int32_t> alone_;        // [rank_of] tokens that visit its rank for it alone
  std::vector<int32_t> newcomer_;     // [rank_of, num_ranks] its tokens that do not visit the rank
  std::vector<int32_t> overlap_;      // [rank_of] see CountOverlap
};

// One expert after another, the most loaded first, joins the rank that its tokens visit already
// most beyond chance. Ranks that are full or would get past `max_load` are left out; if all would,
// the least loaded takes it.
std::vector<int> JoinCompanions(const LayerTokens& tokens, int num_ranks, int slots,
                                int64_t max_load) {
  struct Rank {
    int64_t load = 0;
    int64_t visits = 0;  // tokens that visit it
    int free = 0;
    int64_t met = 0;  // tokens of the expert in question that visit it
  };
  const int num_experts = static_cast<int>(tokens.loads.size());
  std::vector<Rank> ranks(num_ranks, {.free = slots});
  std::vector<uint8_t> visited(tokens.num_tokens() * num_ranks, 0);  // [num_tokens, num_ranks]
  std::vector<int> order(num_experts), rank_of(num_experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return tokens.loads[a] > tokens.loads[b]; });
  for (int expert : order) {
    const int64_t load = tokens.loads[expert];
    for (int r = 0; r < num_ranks; ++r) ranks[r].met = 0;
    for (int32_t token : tokens.TokensOf(expert)) {
      for (int r = 0; r < num_ranks; ++r) ranks[r].met += visited[int64_t{token} * num_ranks + r];
    }
    const auto merit = [&](const Rank& rank) {
      const bool fits = rank.load + load <= max_load;
      const int64_t beyond_chance = rank.met * tokens.num_tokens() - load * rank.visits;
      return std::tuple(rank.free > 0, fits, fits ? beyond_chance : 0, -rank.load);
    };
    const auto best =
        std::max_element(ranks.begin(), ranks.end(),
                         [&](const Rank& a, const Rank& b) { return merit(a) < merit(b); });
    rank_of[expert] = static_cast<int>(best - ranks.begin());
    best->load += load;
    best->visits += load - best->met;
    --best->free;
    for (int32_t token : tokens.TokensOf(expert)) {
      visited[int64_t{token} * num_ranks + rank_of[expert]] = 1;
    }
  }
  return rank_of;
}

// The most even load that whole experts allow, about.
std::vector<int> PackByLoad(const LayerTokens& tokens, int num_ranks, int slots) {
  const std::vector<int> single(tokens.loads.size(), 1);
  std::vector<int> rank_of;
  for (const std::vector<RankId>& ranks : PackExperts(tokens.loads, single, num_ranks, slots)) {
    rank_of.push_back(base::Index(ranks[0]));
  }
  return rank_of;
}

std::vector<int> InOrder(int64_t num_experts, int num_ranks) {
  std::vector<int> rank_of(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) {
    rank_of[e] = static_cast<int>(e * num_ranks / num_experts);
  }
  return rank_of;
}

LayerRanks LocalLayer(const LayerTokens& tokens, int num_ranks) {
  const int64_t num_experts = static_cast<int64_t>(tokens.loads.size());
  const int slots = static_cast<int>(base::CeilDiv(num_experts, num_ranks));
  const auto partition = [&](std::vector<int> rank_of) {
    return Partition(tokens, std::move(rank_of), num_ranks, slots);
  };
  int64_t max_load = static_cast<int64_t>(kLocalMaxOverMean * tokens.experts.size() / num_ranks);
  Partition best = partition(PackByLoad(tokens, num_ranks, slots));
  max_load = std::max(max_load, best.max_load());
  best.Improve(max_load);
  Partition other = partition(JoinCompanions(tokens, num_ranks, slots, max_load));
  if (other.max_load() <= max_load) {
    other.Improve(max_load);
    if (other.num_visits() < best.num_visits()) std::swap(best, other);
  }
  other = partition(InOrder(num_experts, num_ranks));
  if (other.num_visits() < best.num_visits()) {
    other.Improve(std::max(max_load, other.max_load()));
    std::swap(best, other);
  }
  LayerRanks placed;
  for (int64_t e = 0; e < num_experts; ++e) placed.push_back({RankId{best.rank_of()[e]}});
  return placed;
}

}  // namespace

Placement LocalPlacement(const RoutingTrace& trace, int num_ranks) {
  std::vector<LayerRanks> layers;
  for (int layer = 0; layer < trace.shape.num_layers; ++layer) {
    layers.push_back(LocalLayer(LayerTokens(trace, layer), num_ranks));
  }
  return Placement::FromLayers(std::move(layers), num_ranks);
}

}  // namespace ternion::experts
