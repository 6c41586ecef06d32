// The experts of a rank that is alone, on a device: rows are routed, worked on and summed by ops,
// and the host neither waits nor looks.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "experts/ffn.h"
#include "experts/routing.h"
#include "experts/shard.h"
#include "kernels/kernels.h"

namespace ternion::experts {

// The matrices of a layer's experts, as expert_matmul wants them.
struct ExpertTables {
  base::Array<kernels::TernaryMatrix> gate, up, down;  // [num_experts]
  kernels::TernaryLayout layout{};                     // of all

  // Of a shard that holds all experts.
  static ExpertTables Make(const ExpertShard& shard, base::Memory& memory);
};

class LocalExperts {
 public:
  // Whether the kernels can do it.
  static bool AreSupported(const kernels::Kernels& kernels) {
    return kernels.group_routes != nullptr;
  }

  // Scratch for up to `max_rows` rows of `top_k` experts each; reused by every layer.
  LocalExperts(int64_t max_rows, int top_k, int num_experts, int64_t hidden, int64_t intermediate,
               base::Memory& memory);

  // Where the gate's choice for a micro-batch goes: [max_rows, top_k], and stays until Run.
  int32_t* experts(int micro_batch) { return experts_.data() + micro_batch * order_.size(); }
  float* weights(int micro_batch) { return weights_.data() + micro_batch * order_.size(); }

  // hidden [choice.num_rows, config.hidden] += what the experts make of `codes`, the rows that
  // `choice` is for. `presum` as in ShardWork.
  void Run(const kernels::Kernels& kernels, kernels::Executor& executor, const FfnConfig& config,
           const ExpertTables& tables, const GateChoice& choice,
           const kernels::QuantizedRows& codes, bool presum, float* hidden);

 private:
  const int num_experts_;
  base::Array<int32_t> experts_;         // [micro-batches, max_rows * top_k]
  base::Array<float> weights_;           // likewise
  base::Array<int32_t> order_, places_;  // [max_rows * top_k]
  base::Array<int32_t> begin_;           // [num_experts + 1]
  base::Array<int32_t> used_;            // [num_experts]
  base::Array<float> gate_, up_;         // [max_rows * top_k, intermediate]
  kernels::QuantizedBuffer inner_;       // [max_rows * top_k, intermediate]
  base::Array<float> y_;                 // [max_rows * top_k, hidden]
};

}  // namespace ternion::experts
