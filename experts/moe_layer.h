// One mixture-of-experts layer over all ranks.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "comm/exchange.h"
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
};

// Scratch and services that all MoE layers of a rank share. Owned by the model; one thread.
struct MoeContext {
  // `max_rows`: own rows of one step; `num_ranks` times as many can arrive.
  MoeContext(const GateConfig& gate, const comm::ExchangeOptions& options, int64_t intermediate,
             comm::Transport* transport, const kernels::Kernels* kernels,
             kernels::Executor* executor);

  const GateConfig gate;
  comm::Transport* const transport;
  const kernels::Kernels* const kernels;
  kernels::Executor* const executor;
  comm::Exchange exchange;
  ShardWorkspace shard;
  base::Array<float> logits;     // [max_rows, num_experts]
  base::Array<int32_t> experts;  // [max_rows, top_k]
  base::Array<float> weights;    // [max_rows, top_k]
  comm::DispatchPlan plan;
  base::Array<float> outputs;  // what goes back: grows to the most rows (or routes) received
};

struct MoeInput {
  kernels::QuantizedRows codes;   // post-attention norm, quantized
  const float* normed = nullptr;  // the same rows before quantization, fp32 [num_rows, hidden]
  uint32_t step = 0;
  uint32_t layer = 0;
};

// hidden [num_rows, hidden] += the layer's output. Collective: every rank calls it equally often,
// with zero rows when idle. Errors come from the exchange and name the peer.
absl::Status MoeForward(const MoeLayerWeights& weights, const Placement& placement,
                        const MoeInput& input, MoeContext& context, float* hidden);

}  // namespace ternion::experts
