// The exchange of several ranks per node: rows cross between nodes once per (token, node) and fan
// out inside.
//
// Two exchanges in one. Across: this rank and its counterparts, one on every node, trade rows for
// whole nodes. Inside: what arrived goes to the node's ranks that hold the experts. Their sums come
// back at fp32, so that a row is rounded once, on its way between nodes. Saves inter-node bytes
// where a token's experts are on several ranks of a node, and costs a hop.
#pragma once

#include <cstdint>
#include <memory_resource>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/exchange.h"
#include "experts/placement.h"
#include "experts/routing.h"
#include "kernels/activations.h"

namespace ternion::experts {

// Where a rank sits among nodes of equal size.
struct NodeLayout {
  // InvalidArgument when nodes have different numbers of ranks.
  static absl::StatusOr<NodeLayout> Make(const comm::Transport& transport);

  std::vector<int> node_of;    // [rank] 0 to num_nodes - 1
  std::vector<RankId> inside;  // [seat] ranks of this rank's node
  std::vector<RankId> across;  // [node] this rank's counterparts: those with its seat
  int num_nodes() const { return static_cast<int>(across.size()); }
};

class HierarchicalExchange {
 public:
  // As comm::Exchange; `options` have presum. `placement` outlives the exchange.
  HierarchicalExchange(const comm::ExchangeOptions& options, const NodeLayout& layout,
                       const Placement& placement, comm::Transport* transport,
                       const kernels::Kernels* kernels, kernels::Executor* executor);

  // Chooses nodes for the rows and sends these off. Collective, as are the other two.
  absl::Status DispatchSend(uint32_t step, uint32_t layer, const GateChoice& choice,
                            const kernels::QuantizedRows& codes, const float* normed);

  // Fans out what arrived, calls run(rows, outputs) for this rank's rows (several times or never)
  // and sends the sums back. outputs: [rows, hidden], zeroed by nobody.
  using RunExpertsFn =
      absl::FunctionRef<absl::Status(const comm::ReceivedRows& rows, float* outputs)>;
  absl::Status RunExperts(RunExpertsFn run);

  // Adds the returned rows onto `out` [own rows, hidden].
  absl::Status CombineRecv(float* out) { return across_.CombineRecv(out); }

  comm::Exchange& across() { return across_; }

 private:
  absl::Status FanOut(const comm::ReceivedRows& rows, RunExpertsFn run);

  const comm::ReceivedRows no_rows_;
  const Placement nodes_;                // (layer, expert) -> nodes, as if they were ranks
  const std::vector<LayerRanks> seats_;  // [layer][expert] seats of this node, or none
  const int node_;
  const RankId seat_;  // this rank's on its node
  const kernels::Kernels* const kernels_;
  kernels::Executor* const executor_;
  comm::Exchange across_;
  comm::Exchange inside_;
  uint32_t step_ = 0;
  uint32_t layer_ = 0;
  RoutingWorkspace routing_;
  kernels::QuantizedBuffer gathered_;          // what arrived from across, in one piece
  std::pmr::vector<const int8_t*> row_codes_;  // its rows
  std::pmr::vector<float> row_scales_;
  base::Array<float> node_sums_;             // [arrived rows, hidden]
  std::vector<base::Array<float>> outputs_;  // of this rank's experts, by arrival
};

}  // namespace ternion::experts
