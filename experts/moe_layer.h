// One mixture-of-experts layer over all ranks, in three steps: MoeDispatch, MoeExperts, MoeCombine.
//
// Two micro-batches may be under way at a time: while the experts work on one, the rows of the
// other travel.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "comm/exchange.h"
#include "experts/hierarchical_exchange.h"
#include "experts/local_experts.h"
#include "experts/placement.h"
#include "experts/routing.h"
#include "experts/shard.h"
#include "kernels/kernels.h"

namespace ternion::experts {

// gate rule (NUMERICS.md, Gates): softmax over all experts, top-k, renormalized or not.
struct GateConfig {
  int num_experts = 0;
  int top_k = 0;
  bool renormalize = false;
};

struct MoeLayerWeights {
  kernels::DenseMatrix gate;  // [num_experts, hidden]
  FfnConfig ffn;
  ExpertShard shard;
  ExpertTables tables{};  // of the shard, where MoeContext::local works
};

// Rows that go through the layers together.
struct MicroBatch {
  comm::Exchange exchange;
  std::unique_ptr<HierarchicalExchange> hierarchical{};  // in place of exchange, if there is one
  bool alone = true;                                     // no other micro-batch is under way
  GateChoice choice{};                                   // of its rows in this layer
  kernels::QuantizedRows codes{};
  // What goes back, one array for each time that rows arrived in a layer; they grow to the most
  // rows (or routes) received.
  std::vector<base::Array<float>> outputs{};
};

// Scratch and services that all MoE layers of a rank share. Owned by the model; one thread.
struct MoeContext {
  // `max_rows`: own rows of one step; `num_ranks` times as many can arrive.
  MoeContext(const GateConfig& gate, const comm::ExchangeOptions& options, int64_t intermediate,
             comm::Transport* transport, const kernels::Kernels* kernels,
             kernels::Executor* executor);

  // From now on rows cross between nodes once per (token, node). `options` as above.
  void UseHierarchy(const NodeLayout& layout, const comm::ExchangeOptions& options,
                    const Placement& placement);

  // From now on no row leaves the device; for a rank that is alone. `options` as above.
  void UseLocalExperts(const comm::ExchangeOptions& options, int64_t intermediate);

  const GateConfig gate;
  comm::Transport* const transport;
  const kernels::Kernels* const kernels;
  kernels::Executor* const executor;
  std::array<MicroBatch, 2> micro_batches;
  std::unique_ptr<LocalExperts> local;  // in place of exchanges, if there is one
  ShardWorkspace shard;                 // of exchanges
  base::Array<float> logits;            // [max_rows, num_experts]
  base::Array<int32_t> experts;         // [max_rows, top_k], the host reads them
  base::Array<float> weights;           // [max_rows, top_k], likewise
  RoutingWorkspace routing;
};

struct MoeInput {
  kernels::QuantizedRows codes;   // post-attention norm, quantized
  const float* normed = nullptr;  // the same rows before quantization, fp32 [num_rows, hidden]
  uint32_t step = 0;
  uint32_t layer = 0;
};

// Chooses experts for the rows and sends these off. Collective, as are the other two: every rank
// calls them equally often and in the same order, with zero rows when idle. Errors come from the
// exchange and name the peer.
absl::Status MoeDispatch(const MoeLayerWeights& weights, const Placement& placement,
                         const MoeInput& input, MoeContext& context, MicroBatch& batch);

// The micro-batch whose rows travel while the experts work on another one. Once all of its rows are
// back, `carry_on` is called, at most once: it takes them (MoeCombine) and goes on to MoeDispatch
// of the next layer.
struct TravellingBatch {
  MicroBatch* batch = nullptr;
  absl::FunctionRef<absl::Status()> carry_on;
  bool carried_on = false;
};

// Runs this rank's experts on everybody's rows and sends their outputs back. `travelling`: null if
// and only if the batch is alone.
absl::Status MoeExperts(const MoeLayerWeights& weights, MoeContext& context, MicroBatch& batch,
                        TravellingBatch* travelling);

// hidden [num_rows, hidden] += the layer's output, when it is back.
absl::Status MoeCombine(const MoeLayerWeights& weights, MoeContext& context, MicroBatch& batch,
                        float* hidden);

}  // namespace ternion::experts
