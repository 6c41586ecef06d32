#include "experts/hierarchical_exchange.h"

#include <algorithm>

#include "base/check.h"
#include "base/status.h"

namespace ternion::experts {
namespace {

// Grows ahead, so that growing comes to an end.
float* Reserve(base::Array<float>& array, size_t count, const kernels::Executor& executor) {
  if (array.size() < count) array = base::Array<float>(count * 5 / 4, *executor.memory);
  return array.data();
}

std::vector<LayerRanks> MapRanks(const Placement& placement,
                                 absl::FunctionRef<int(RankId)> target_of) {
  std::vector<LayerRanks> layers(placement.num_layers(), LayerRanks(placement.num_experts()));
  for (int layer = 0; layer < placement.num_layers(); ++layer) {
    for (int expert = 0; expert < placement.num_experts(); ++expert) {
      std::vector<RankId>& targets = layers[layer][expert];
      for (RankId rank : placement.RanksOf(layer, ExpertId{expert})) {
        if (const int target = target_of(rank); target >= 0) targets.push_back(RankId{target});
      }
      std::sort(targets.begin(), targets.end());
      targets.erase(std::unique(targets.begin(), targets.end()), targets.end());
    }
  }
  return layers;
}

Placement PlacementOnNodes(const Placement& placement, const NodeLayout& layout) {
  return Placement::FromLayers(
      MapRanks(placement, [&](RankId rank) { return layout.node_of[base::Index(rank)]; }),
      layout.num_nodes());
}

// A rank's seat on this node, or -1.
RankId SeatOf(const NodeLayout& layout, RankId rank) {
  const auto seat = std::find(layout.inside.begin(), layout.inside.end(), rank);
  return RankId{seat == layout.inside.end() ? -1 : static_cast<int>(seat - layout.inside.begin())};
}

std::vector<LayerRanks> SeatsHere(const Placement& placement, const NodeLayout& layout) {
  return MapRanks(placement, [&](RankId rank) { return base::Index(SeatOf(layout, rank)); });
}

// Codes are what arrived, so they travel as codes; sums stay as they are.
comm::ExchangeOptions InsideOptions(comm::ExchangeOptions options, int num_nodes) {
  options.dispatch = options.act_bits == 4 ? comm::RowFormat::kInt4 : comm::RowFormat::kInt8;
  options.combine = comm::RowFormat::kFp32;
  options.max_rows *= num_nodes;
  return options;
}

}  // namespace

absl::StatusOr<NodeLayout> NodeLayout::Make(const comm::Transport& transport) {
  NodeLayout layout;
  std::vector<int> names;                    // [node]
  std::vector<std::vector<RankId>> members;  // [node]
  for (int rank = 0; rank < transport.size(); ++rank) {
    const int name = transport.NodeOf(RankId{rank});
    const size_t node = std::find(names.begin(), names.end(), name) - names.begin();
    if (node == names.size()) {
      names.push_back(name);
      members.emplace_back();
    }
    layout.node_of.push_back(static_cast<int>(node));
    members[node].push_back(RankId{rank});
  }
  layout.inside = members[layout.node_of[base::Index(transport.rank())]];
  const size_t seat = std::find(layout.inside.begin(), layout.inside.end(), transport.rank()) -
                      layout.inside.begin();
  for (size_t node = 0; node < members.size(); ++node) {
    if (members[node].size() != members[0].size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("a hierarchical exchange needs as many ranks on every node; node 0 has ",
                       members[0].size(), ", node ", node, " has ", members[node].size()));
    }
    layout.across.push_back(members[node][seat]);
  }
  return layout;
}

HierarchicalExchange::HierarchicalExchange(const comm::ExchangeOptions& options,
                                           const NodeLayout& layout, const Placement& placement,
                                           comm::Transport* transport,
                                           const kernels::Kernels* kernels,
                                           kernels::Executor* executor)
    : nodes_(PlacementOnNodes(placement, layout)),
      seats_(SeatsHere(placement, layout)),
      node_(layout.node_of[base::Index(transport->rank())]),
      seat_(SeatOf(layout, transport->rank())),
      kernels_(kernels),
      executor_(executor),
      across_(options, transport, kernels, executor, layout.across),
      inside_(InsideOptions(options, layout.num_nodes()), transport, kernels, executor,
              layout.inside),
      row_codes_(executor->staging),
      row_scales_(executor->staging) {
  TERNION_CHECK(options.presum);
}

absl::Status HierarchicalExchange::DispatchSend(uint32_t step, uint32_t layer,
                                                const GateChoice& choice,
                                                const kernels::QuantizedRows& codes,
                                                const float* normed) {
  step_ = step;
  layer_ = layer;
  const comm::DispatchPlan& plan =
      PlanDispatch(nodes_, static_cast<int>(layer), RankId{node_}, choice, routing_);
  return across_.DispatchSend(step, layer, plan, codes, normed);
}

absl::Status HierarchicalExchange::RunExperts(RunExpertsFn run) {
  TERNION_ASSIGN_OR_RETURN(const comm::ReceivedRows* arrived, across_.DispatchRecv());
  // The node's ranks fan out together, also those whom nobody sent a row.
  TERNION_RETURN_IF_ERROR(FanOut(arrived == nullptr ? no_rows_ : *arrived, run));
  if (arrived == nullptr) return absl::OkStatus();
  TERNION_RETURN_IF_ERROR(across_.CombineSend(node_sums_.data()));
  return across_.DispatchRecv().status();
}

absl::Status HierarchicalExchange::FanOut(const comm::ReceivedRows& rows, RunExpertsFn run) {
  const int64_t hidden = inside_.options().hidden;
  const int64_t num_rows = static_cast<int64_t>(rows.rows.size());
  row_codes_.clear();
  row_scales_.clear();
  for (const comm::ReceivedRow& row : rows.rows) {
    row_codes_.push_back(row.codes);
    row_scales_.push_back(row.scale);
  }
  if (gathered_.max_rows() <= num_rows) {
    gathered_ = kernels::QuantizedBuffer(num_rows + 1, hidden, *executor_->memory);
  }
  const kernels::QuantizedRows codes = gathered_.rows(num_rows);
  kernels_->gather_rows({.rows = row_codes_.data(), .scales = row_scales_.data(), .out = codes},
                        *executor_);
  TERNION_ASSIGN_OR_RETURN(const comm::DispatchPlan* plan,
                           PlanFanOut(seats_[layer_], inside_.size(), seat_, rows, routing_));
  TERNION_RETURN_IF_ERROR(inside_.DispatchSend(step_, layer_, *plan, codes, nullptr));
  for (size_t arrival = 0;; ++arrival) {
    TERNION_ASSIGN_OR_RETURN(const comm::ReceivedRows* received, inside_.DispatchRecv());
    if (received == nullptr) break;
    if (outputs_.size() <= arrival) outputs_.resize(arrival + 1);
    float* const outputs = Reserve(outputs_[arrival], received->rows.size() * hidden, *executor_);
    TERNION_RETURN_IF_ERROR(run(*received, outputs));
    TERNION_RETURN_IF_ERROR(inside_.CombineSend(outputs));
  }
  float* const sums = Reserve(node_sums_, num_rows * hidden, *executor_);
  kernels_->zero({.out = sums, .count = num_rows * hidden}, *executor_);
  return inside_.CombineRecv(node_sums_.data());
}

}  // namespace ternion::experts
