// Which ranks hold which experts.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"

namespace ternion::experts {

using base::ExpertId;
using base::RankId;

// The ranks of every expert of a layer, ascending.
using LayerRanks = std::vector<std::vector<RankId>>;

// (layer, expert) -> one or more ranks, ascending. Immutable; the same on every rank. Any uneven
// layout is valid, also ranks without experts. Layers without experts are not counted.
class Placement {
 public:
  // Expert e of every layer on rank floor(e * num_ranks / num_experts).
  static Placement Contiguous(int num_layers, int num_experts, int num_ranks);

  // From JSON text (docs/placement.md): {"experts": [R, ...]} for all layers alike, or
  // {"layers": [[R, ...], ...]}; R is a rank or an array of ranks. InvalidArgument names the layer
  // and the expert when counts do not match or a rank does not exist.
  static absl::StatusOr<Placement> FromJson(const std::string& text, int num_layers,
                                            int num_experts, int num_ranks);

  // ranks [num_layers][num_experts]: of each expert one or more, ascending, below num_ranks.
  static Placement FromLayers(std::vector<LayerRanks> ranks, int num_ranks);

  // What FromJson reads, in its second form.
  std::string ToJson() const;

  std::span<const RankId> RanksOf(int layer, ExpertId expert) const;
  // Experts of `rank` in `layer`, ascending.
  std::vector<ExpertId> ExpertsOf(int layer, RankId rank) const;
  bool Holds(int layer, ExpertId expert, RankId rank) const;

  int num_layers() const { return num_layers_; }
  int num_experts() const { return num_experts_; }
  int num_ranks() const { return num_ranks_; }

 private:
  Placement(int num_layers, int num_experts, int num_ranks);

  int num_layers_ = 0;
  int num_experts_ = 0;
  int num_ranks_ = 0;
  std::vector<std::vector<RankId>> ranks_;  // [num_layers * num_experts]
};

}  // namespace ternion::experts
