#include "experts/moe_layer.h"

#include <algorithm>

#include "base/status.h"
#include "comm/finish.h"

namespace ternion::experts {
namespace {

// (row, expert) pairs worked on at a time: enough rows per expert for a GEMM, little enough memory.
constexpr int64_t kMaxChunkRoutes = 4096;

// With so many rows for each expert the products are bound by arithmetic, so that rows which are
// here may start before the others are: reading the weights twice costs nothing.
constexpr int64_t kComputeBoundRows = 32;

comm::ExchangeOptions WithMicroBatch(comm::ExchangeOptions options, int micro_batch) {
  options.micro_batch = micro_batch;
  return options;
}

int64_t MaxRoutes(const comm::ExchangeOptions& options, int num_ranks) {
  return std::min(options.max_rows * num_ranks * options.top_k, kMaxChunkRoutes);
}

// Which experts each row goes to, and with which weight.
GateChoice ChooseExperts(const kernels::DenseMatrix& gate, const MoeInput& input, MoeContext& ctx,
                         int micro_batch) {
  int32_t* const experts = ctx.local ? ctx.local->experts(micro_batch) : ctx.experts.data();
  float* const weights = ctx.local ? ctx.local->weights(micro_batch) : ctx.weights.data();
  const int64_t num_rows = input.codes.num_rows;
  ctx.kernels->dense_matmul({.x = input.normed,
                             .weights = gate,
                             .y = ctx.logits.data(),
                             .num_rows = num_rows,
                             .x_stride = gate.columns,
                             .y_stride = gate.rows},
                            *ctx.executor);
  ctx.kernels->gate_top_k({.logits = ctx.logits.data(),
                           .ids = experts,
                           .weights = weights,
                           .num_rows = num_rows,
                           .num_experts = ctx.gate.num_experts,
                           .k = ctx.gate.top_k,
                           .renormalize = ctx.gate.renormalize},
                          *ctx.executor);
  return {experts, weights, num_rows, ctx.gate.top_k};
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

// Room for the outputs of `received`, which arrived as the `arrival`-th of its layer.
float* OutputsFor(const comm::ReceivedRows& received, bool presum, int64_t hidden,
                  const kernels::Executor& executor, std::vector<base::Array<float>>& outputs,
                  size_t arrival) {
  if (outputs.size() <= arrival) outputs.resize(arrival + 1);
  base::Array<float>& room = outputs[arrival];
  const size_t num_floats = (presum ? received.rows.size() : received.routes.size()) * hidden;
  if (room.size() < num_floats) room = base::Array<float>(num_floats * 5 / 4, *executor.memory);
  return room.data();
}

// The exchange whose CombineRecv ends the batch's layer.
comm::Exchange& ReturnOf(MicroBatch& batch) {
  return batch.hierarchical == nullptr ? batch.exchange : batch.hierarchical->across();
}

// Between two pieces of work: messages move on, and so does the travelling micro-batch once it is
// back.
absl::Status LookAfter(MoeContext& ctx, TravellingBatch& travelling) {
  if (travelling.carried_on) return ctx.transport->TryReceive({}).status();
  TERNION_ASSIGN_OR_RETURN(const bool back, ReturnOf(*travelling.batch).CombineReady());
  if (!back) return absl::OkStatus();
  travelling.carried_on = true;
  return travelling.carry_on();
}

}  // namespace

MoeContext::MoeContext(const GateConfig& gate, const comm::ExchangeOptions& options,
                       int64_t intermediate, comm::Transport* transport,
                       const kernels::Kernels* kernels, kernels::Executor* executor)
    : gate(gate),
      transport(transport),
      kernels(kernels),
      executor(executor),
      micro_batches{
          {{.exchange = comm::Exchange(WithMicroBatch(options, 0), transport, kernels, executor)},
           {.exchange = comm::Exchange(WithMicroBatch(options, 1), transport, kernels, executor)}}},
      shard(MaxRoutes(options, transport->size()), options.hidden, intermediate, *executor),
      logits(options.max_rows * gate.num_experts, *executor->memory),
      experts(options.max_rows * gate.top_k, *executor->staging),
      weights(options.max_rows * gate.top_k, *executor->staging) {}

void MoeContext::UseLocalExperts(const comm::ExchangeOptions& options, int64_t intermediate) {
  shard = ShardWorkspace(0, options.hidden, intermediate, *executor);
  local = std::make_unique<LocalExperts>(options.max_rows, gate.top_k, gate.num_experts,
                                         options.hidden, intermediate, *executor->memory);
}

void MoeContext::UseHierarchy(const NodeLayout& layout, const comm::ExchangeOptions& options,
                              const Placement& placement) {
  for (int i = 0; i < 2; ++i) {
    micro_batches[i].hierarchical = std::make_unique<HierarchicalExchange>(
        WithMicroBatch(options, i), layout, placement, transport, kernels, executor);
  }
}

absl::Status MoeDispatch(const MoeLayerWeights& weights, const Placement& placement,
                         const MoeInput& input, MoeContext& ctx, MicroBatch& batch) {
  const GateChoice& choice = batch.choice =
      ChooseExperts(weights.gate, input, ctx, batch.exchange.options().micro_batch);
  if (ctx.local != nullptr) {
    batch.codes = input.codes;
    return absl::OkStatus();
  }
  TERNION_RETURN_IF_ERROR(comm::Finish(*ctx.kernels, *ctx.executor));
  if (batch.hierarchical != nullptr) {
    return batch.hierarchical->DispatchSend(input.step, input.layer, choice, input.codes,
                                            input.normed);
  }
  const comm::DispatchPlan& plan = PlanDispatch(placement, static_cast<int>(input.layer),
                                                ctx.transport->rank(), choice, ctx.routing);
  return batch.exchange.DispatchSend(input.step, input.layer, plan, input.codes, input.normed);
}

absl::Status MoeExperts(const MoeLayerWeights& weights, MoeContext& ctx, MicroBatch& batch,
                        TravellingBatch* travelling) {
  if (ctx.local != nullptr) return absl::OkStatus();  // MoeCombine does it all
  TERNION_CHECK(batch.alone == (travelling == nullptr));
  const bool presum = batch.exchange.options().presum;
  const auto look_after = [&] { return LookAfter(ctx, *travelling); };
  const absl::FunctionRef<absl::Status()> between = look_after;
  const auto run = [&](const comm::ReceivedRows& received, float* outputs) -> absl::Status {
    TERNION_RETURN_IF_ERROR(CheckHeld(weights.shard, received));
    if (batch.alone) TERNION_RETURN_IF_ERROR(batch.exchange.Flush());
    const ShardWork work = {.config = &weights.ffn,
                            .received = &received,
                            .presum = presum,
                            .outputs = outputs,
                            .between = batch.alone ? nullptr : &between};
    return weights.shard.Run(*ctx.kernels, *ctx.executor, work, ctx.shard);
  };
  if (batch.hierarchical != nullptr) return batch.hierarchical->RunExperts(run);
  const int64_t min_routes = kComputeBoundRows * std::max(weights.shard.num_experts_here(), 1);
  for (size_t arrival = 0;; ++arrival) {
    const bool other_travels = !batch.alone && !travelling->carried_on;
    TERNION_ASSIGN_OR_RETURN(
        const comm::ReceivedRows* received,
        batch.exchange.DispatchRecv(min_routes,
                                    other_travels ? &travelling->batch->exchange : nullptr));
    if (received == nullptr) return absl::OkStatus();
    if (received->rows.empty()) {
      TERNION_RETURN_IF_ERROR(look_after());
      continue;
    }
    float* const outputs =
        OutputsFor(*received, presum, weights.ffn.hidden, *ctx.executor, batch.outputs, arrival);
    TERNION_RETURN_IF_ERROR(run(*received, outputs));
    TERNION_RETURN_IF_ERROR(batch.exchange.CombineSend(outputs));
  }
}

absl::Status MoeCombine(const MoeLayerWeights& weights, MoeContext& ctx, MicroBatch& batch,
                        float* hidden) {
  if (ctx.local != nullptr) {
    ctx.local->Run(*ctx.kernels, *ctx.executor, weights.ffn, weights.tables, batch.choice,
                   batch.codes, batch.exchange.options().presum, hidden);
    return absl::OkStatus();
  }
  TERNION_RETURN_IF_ERROR(ReturnOf(batch).CombineRecv(hidden));
  // The next layer's attention runs next; with two micro-batches, experts look after both.
  return batch.alone ? batch.exchange.Flush() : absl::OkStatus();
}

}  // namespace ternion::experts
