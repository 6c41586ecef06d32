#include "experts/moe_layer.h"

#include <algorithm>

#include "base/status.h"

namespace ternion::experts {
namespace {

// (row, expert) pairs worked on at a time: enough rows per expert for a GEMM, little enough memory.
constexpr int64_t kMaxChunkRoutes = 4096;

int64_t MaxRoutes(const comm::ExchangeOptions& options, int num_ranks) {
  return std::min(options.max_rows * num_ranks * options.top_k, kMaxChunkRoutes);
}

// Which experts each row goes to, and with which weight.
GateChoice ChooseExperts(const kernels::DenseMatrix& gate, const MoeInput& input, MoeContext& ctx) {
  const int64_t num_rows = input.codes.num_rows;
  ctx.kernels->dense_matmul({.x = input.normed,
                             .weights = gate,
                             .y = ctx.logits.data(),
                             .num_rows = num_rows,
                             .x_stride = gate.columns,
                             .y_stride = gate.rows},
                            *ctx.executor);
  ctx.kernels->gate_top_k({.logits = ctx.logits.data(),
                           .ids = ctx.experts.data(),
                           .weights = ctx.weights.data(),
                           .num_rows = num_rows,
                           .num_experts = ctx.gate.num_experts,
                           .k = ctx.gate.top_k,
                           .renormalize = ctx.gate.renormalize},
                          *ctx.executor);
  return {ctx.experts.data(), ctx.weights.data(), num_rows, ctx.gate.top_k};
}

// A peer that routes to an expert we do not hold works from another placement.
absl::Status CheckHeld(const ExpertShard& shard, const comm::ReceivedRows& received) {
  for (const comm::Route& route : received.routes) {
    if (!shard.Holds(route.expert)) {
      return absl::InvalidArgumentError(absl::StrCat("a peer sent rows for expert ",
                                                     base::Index(route.expert),
                                                     ", which is not placed on this rank"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

MoeContext::MoeContext(const GateConfig& gate, const comm::ExchangeOptions& options,
                       int64_t intermediate, comm::Transport* transport,
                       const kernels::Kernels* kernels, kernels::Executor* executor)
    : gate(gate),
      transport(transport),
      kernels(kernels),
      executor(executor),
      exchange(options, transport, kernels, executor),
      shard(MaxRoutes(options, transport->size()), options.hidden, intermediate),
      logits(options.max_rows * gate.num_experts),
      experts(options.max_rows * gate.top_k),
      weights(options.max_rows * gate.top_k) {}

absl::Status MoeForward(const MoeLayerWeights& weights, const Placement& placement,
                        const MoeInput& input, MoeContext& ctx, float* hidden) {
  const GateChoice choice = ChooseExperts(weights.gate, input, ctx);
  PlanDispatch(placement, static_cast<int>(input.layer), ctx.transport->rank(), choice, ctx.plan);

  TERNION_RETURN_IF_ERROR(
      ctx.exchange.DispatchSend(input.step, input.layer, ctx.plan, input.codes, input.normed));
  TERNION_ASSIGN_OR_RETURN(const comm::ReceivedRows* received, ctx.exchange.DispatchRecv());
  TERNION_RETURN_IF_ERROR(CheckHeld(weights.shard, *received));

  const bool presum = ctx.exchange.options().presum;
  const size_t num_outputs = presum ? received->rows.size() : received->routes.size();
  const size_t num_floats = num_outputs * weights.ffn.hidden;
  if (ctx.outputs.size() < num_floats) ctx.outputs = base::Array<float>(num_floats * 5 / 4);
  weights.shard.Run(*ctx.kernels, *ctx.executor, weights.ffn, *received, presum, ctx.shard,
                    ctx.outputs.data());

  TERNION_RETURN_IF_ERROR(ctx.exchange.CombineSend(ctx.outputs.data()));
  return ctx.exchange.CombineRecv(hidden);
}

}  // namespace ternion::experts
