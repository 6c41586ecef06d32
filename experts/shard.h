// The experts of one layer that live on this rank.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "comm/exchange.h"
#include "experts/ffn.h"
#include "kernels/kernels.h"

namespace ternion::experts {

using base::ExpertId;

// Scratch of ExpertShard::Run, shared by all layers of a rank. Rows are worked on in chunks of at
// most `max_routes` (row, expert) pairs, so memory is bounded however many rows arrive.
struct ShardWorkspace {
  ShardWorkspace(int64_t max_routes, int64_t hidden, int64_t intermediate);

  struct Work {
    ExpertId expert{};
    int32_t row = 0;
    int32_t route = 0;
  };
  int64_t max_routes = 0;
  FfnWorkspace ffn;
  kernels::QuantizedBuffer gathered;     // [max_routes, hidden]
  base::Array<float> y;                  // [max_routes, hidden]
  std::vector<Work> work;                // all pairs, by ascending expert, then row
  std::vector<int32_t> expert_begin;     // counting sort of `work`
  std::vector<const int8_t*> row_codes;  // the chunk's rows
  std::vector<float> row_scales;
  std::vector<FfnGroup> groups;
  std::vector<int32_t> term_begin;  // per received row: its terms of this chunk
  std::vector<const float*> terms;
  std::vector<float> term_weights;
};

class ExpertShard {
 public:
  ExpertShard() = default;
  explicit ExpertShard(int num_experts) : experts_(num_experts) {}

  void Set(ExpertId expert, FfnWeights weights);
  bool Holds(ExpertId expert) const { return experts_[base::Index(expert)] != nullptr; }

  // Runs every route of `received` (all must be held here) grouped by expert.
  // presum: outputs [received rows, hidden] = sum of weight * y in ascending expert id.
  // else:   outputs [received routes, hidden] = y, in the order of received.routes.
  void Run(const kernels::Kernels& kernels, kernels::Executor& executor, const FfnConfig& config,
           const comm::ReceivedRows& received, bool presum, ShardWorkspace& workspace,
           float* outputs) const;

 private:
  std::vector<std::unique_ptr<FfnWeights>> experts_;  // [num_experts], null when not here
};

}  // namespace ternion::experts
