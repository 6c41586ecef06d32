#include "experts/local_experts.h"

#include <vector>

#include "base/check.h"

namespace ternion::experts {
namespace {

using kernels::TernaryMatrix;

base::Array<TernaryMatrix> Table(const ExpertShard& shard,
                                 kernels::OwnedTernaryMatrix FfnWeights::*matrix,
                                 base::Memory& memory) {
  base::Array<TernaryMatrix> table(shard.num_experts());
  for (int expert = 0; expert < shard.num_experts(); ++expert) {
    table[expert] = (shard.at(ExpertId{expert}).*matrix).view;
  }
  table.MoveTo(memory);
  return table;
}

}  // namespace

ExpertTables ExpertTables::Make(const ExpertShard& shard, base::Memory& memory) {
  return {.gate = Table(shard, &FfnWeights::gate, memory),
          .up = Table(shard, &FfnWeights::up, memory),
          .down = Table(shard, &FfnWeights::down, memory),
          .layout = shard.at(ExpertId{0}).gate.view.layout};
}

LocalExperts::LocalExperts(int64_t max_rows, int top_k, int num_experts, int64_t hidden,
                           int64_t intermediate, base::Memory& memory)
    : num_experts_(num_experts),
      experts_(2 * max_rows * top_k, memory),
      weights_(2 * max_rows * top_k, memory),
      order_(max_rows * top_k, memory),
      places_(max_rows * top_k, memory),
      begin_(num_experts + 1, memory),
      used_(num_experts, memory),
      gate_(max_rows * top_k * intermediate, memory),
      up_(max_rows * top_k * intermediate, memory),
      inner_(max_rows * top_k, intermediate, memory),
      y_(max_rows * top_k * hidden, memory) {}

void LocalExperts::Run(const kernels::Kernels& kernels, kernels::Executor& executor,
                       const FfnConfig& config, const ExpertTables& tables,
                       const GateChoice& choice, const kernels::QuantizedRows& codes, bool presum,
                       float* hidden) {
  const int64_t num_routes = choice.num_rows * choice.top_k;
  TERNION_CHECK(num_routes <= static_cast<int64_t>(order_.size()));
  kernels.group_routes({.experts = choice.experts,
                        .order = order_.data(),
                        .places = places_.data(),
                        .begin = begin_.data(),
                        .used = used_.data(),
                        .num_routes = num_routes,
                        .num_experts = num_experts_},
                       executor);
  kernels.expert_matmul(
      {.x = codes,
       .matrices = {{tables.gate.data(), gate_.data()}, {tables.up.data(), up_.data()}},
       .num_matrices = 2,
       .order = order_.data(),
       .k = choice.top_k,
       .num_routes = num_routes,
       .begin = begin_.data(),
       .used = used_.data(),
       .rows = config.intermediate,
       .num_experts = num_experts_,
       .layout = tables.layout},
      executor);
  const kernels::QuantizedRows inner = inner_.rows(num_routes);
  ActivateFfn(kernels, executor, config, gate_.data(), up_.data(), inner);
  kernels.expert_matmul({.x = inner,
                         .matrices = {{tables.down.data(), y_.data()}},
                         .num_routes = num_routes,
                         .begin = begin_.data(),
                         .used = used_.data(),
                         .rows = config.hidden,
                         .num_experts = num_experts_,
                         .layout = tables.layout},
                        executor);
  kernels.sum_routes({.y = y_.data(),
                      .places = places_.data(),
                      .weights = choice.weights,
                      .out = hidden,
                      .num_rows = choice.num_rows,
                      .dim = config.hidden,
                      .k = choice.top_k,
                      .presum = presum},
                     executor);
}

}  // namespace ternion::experts
