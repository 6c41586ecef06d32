#include "experts/placement.h"

#include <algorithm>

#include "base/check.h"
#include "base/status.h"
#include "nlohmann/json.hpp"

namespace ternion::experts {
namespace {

using Json = nlohmann::json;

absl::Status AddRank(const Json& value, int num_ranks, std::vector<RankId>& ranks) {
  if (!value.is_number_integer()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a rank must be an integer, not ", value.dump()));
  }
  const int64_t rank = value.get<int64_t>();
  if (rank < 0 || rank >= num_ranks) {
    return absl::InvalidArgumentError(
        absl::StrCat("names rank ", rank, ", but ranks are 0 to ", num_ranks - 1));
  }
  ranks.push_back(RankId(rank));
  return absl::OkStatus();
}

// R of the format: one rank, or an array of distinct ranks.
absl::StatusOr<std::vector<RankId>> ParseRanks(const Json& value, int num_ranks) {
  std::vector<RankId> ranks;
  if (!value.is_array()) {
    TERNION_RETURN_IF_ERROR(AddRank(value, num_ranks, ranks));
    return ranks;
  }
  for (const Json& rank : value) TERNION_RETURN_IF_ERROR(AddRank(rank, num_ranks, ranks));
  std::sort(ranks.begin(), ranks.end());
  if (ranks.empty()) return absl::InvalidArgumentError("has no rank");
  if (std::adjacent_find(ranks.begin(), ranks.end()) != ranks.end()) {
    return absl::InvalidArgumentError("names a rank twice");
  }
  return ranks;
}

}  // namespace

Placement::Placement(int num_layers, int num_experts, int num_ranks)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      num_ranks_(num_ranks),
      ranks_(static_cast<size_t>(num_layers) * num_experts) {}

Placement Placement::Contiguous(int num_layers, int num_experts, int num_ranks) {
  Placement placement(num_layers, num_experts, num_ranks);
  for (int layer = 0; layer < num_layers; ++layer) {
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      placement.ranks_[layer * num_experts + expert] = {RankId(expert * num_ranks / num_experts)};
    }
  }
  return placement;
}

absl::StatusOr<Placement> Placement::FromJson(const std::string& text, int num_layers,
                                              int num_experts, int num_ranks) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.contains("experts") == json.contains("layers")) {
    return absl::InvalidArgumentError(
        "a placement is a JSON object with either \"experts\" or \"layers\"");
  }
  const bool alike = json.contains("experts");
  const Json& layers = alike ? json["experts"] : json["layers"];
  if (!layers.is_array() || (!alike && layers.size() != static_cast<size_t>(num_layers))) {
    return absl::InvalidArgumentError(absl::StrCat("the placement must have one array for each of ",
                                                   num_layers, " layers with experts"));
  }
  Placement placement(num_layers, num_experts, num_ranks);
  for (int layer = 0; layer < num_layers; ++layer) {
    const Json& experts = alike ? layers : layers[layer];
    if (!experts.is_array() || experts.size() != static_cast<size_t>(num_experts)) {
      return absl::InvalidArgumentError(absl::StrCat("placement of layer ", layer, ": expected ",
                                                     num_experts, " experts, found ",
                                                     experts.is_array() ? experts.size() : 0));
    }
    for (int expert = 0; expert < num_experts; ++expert) {
      absl::StatusOr<std::vector<RankId>> ranks = ParseRanks(experts[expert], num_ranks);
      if (!ranks.ok()) {
        return base::Annotate(ranks.status(),
                              absl::StrCat("placement of layer ", layer, ", expert ", expert));
      }
      placement.ranks_[layer * num_experts + expert] = *std::move(ranks);
    }
  }
  return placement;
}

Placement Placement::FromLayers(std::vector<LayerRanks> ranks, int num_ranks) {
  TERNION_CHECK(!ranks.empty());
  const int num_layers = static_cast<int>(ranks.size());
  Placement placement(num_layers, static_cast<int>(ranks[0].size()), num_ranks);
  auto next = placement.ranks_.begin();
  for (LayerRanks& layer : ranks) {
    TERNION_CHECK(layer.size() == ranks[0].size());
    for (std::vector<RankId>& expert : layer) {
      TERNION_CHECK(!expert.empty() && std::is_sorted(expert.begin(), expert.end()));
      TERNION_CHECK(expert.front() >= RankId{0} && expert.back() < RankId{num_ranks});
      *next++ = std::move(expert);
    }
  }
  return placement;
}

std::string Placement::ToJson() const {
  Json layers = Json::array();
  for (int layer = 0; layer < num_layers_; ++layer) {
    Json experts = Json::array();
    for (int expert = 0; expert < num_experts_; ++expert) {
      const std::span<const RankId> ranks = RanksOf(layer, ExpertId(expert));
      Json entry = Json::array();
      for (RankId rank : ranks) entry.push_back(base::Index(rank));
      experts.push_back(ranks.size() == 1 ? entry[0] : entry);
    }
    layers.push_back(std::move(experts));
  }
  return Json{{"layers", std::move(layers)}}.dump();
}

std::span<const RankId> Placement::RanksOf(int layer, ExpertId expert) const {
  return ranks_[layer * num_experts_ + base::Index(expert)];
}

std::vector<ExpertId> Placement::ExpertsOf(int layer, RankId rank) const {
  std::vector<ExpertId> experts;
  for (int expert = 0; expert < num_experts_; ++expert) {
    if (Holds(layer, ExpertId(expert), rank)) experts.push_back(ExpertId(expert));
  }
  return experts;
}

bool Placement::Holds(int layer, ExpertId expert, RankId rank) const {
  const std::span<const RankId> ranks = RanksOf(layer, expert);
  return std::binary_search(ranks.begin(), ranks.end(), rank);
}

}  // namespace ternion::experts
