#include "experts/shard.h"

#include <algorithm>
#include <span>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "comm/finish.h"

namespace ternion::experts {
namespace {

using Work = ShardWorkspace::Work;

int64_t WeightBytes(const FfnWeights& weights) {
  return weights.gate.view.bytes() + weights.up.view.bytes() + weights.down.view.bytes();
}

// Counting sort of all (row, expert) pairs by expert; rows stay in order inside an expert.
void SortByExpert(const comm::ReceivedRows& received, int num_experts, ShardWorkspace& ws) {
  ws.expert_begin.assign(num_experts + 1, 0);
  for (const comm::Route& route : received.routes) ++ws.expert_begin[base::Index(route.expert) + 1];
  for (int e = 0; e < num_experts; ++e) ws.expert_begin[e + 1] += ws.expert_begin[e];
  ws.work.resize(received.routes.size());
  for (size_t row = 0; row < received.rows.size(); ++row) {
    const comm::ReceivedRow& r = received.rows[row];
    for (int32_t route = r.first_route; route < r.first_route + r.num_routes; ++route) {
      const ExpertId expert = received.routes[route].expert;
      ws.work[ws.expert_begin[base::Index(expert)]++] = {expert, static_cast<int32_t>(row), route};
    }
  }
}

// The chunk's input rows, contiguous and grouped by expert.
kernels::QuantizedRows GatherChunk(const kernels::Kernels& kernels, kernels::Executor& executor,
                                   const comm::ReceivedRows& received, std::span<const Work> chunk,
                                   ShardWorkspace& ws) {
  ws.row_codes.clear();
  ws.row_scales.clear();
  for (const Work& work : chunk) {
    ws.row_codes.push_back(received.rows[work.row].codes);
    ws.row_scales.push_back(received.rows[work.row].scale);
  }
  const kernels::QuantizedRows x = ws.gathered.rows(static_cast<int64_t>(chunk.size()));
  kernels.gather_rows({.rows = ws.row_codes.data(), .scales = ws.row_scales.data(), .out = x},
                      executor);
  return x;
}

int64_t NumOutputs(const ShardWork& work) {
  return work.presum ? work.received->rows.size() : work.received->routes.size();
}

// Adds what the chunk's rows of y are to outputs, onto what is there or (`accumulate` false) onto
// 0. Chunks come in ascending expert id, and so do the terms of a row inside a chunk: the order of
// the sum does not depend on where chunks end.
void AddToOutputs(const kernels::Kernels& kernels, kernels::Executor& executor,
                  const ShardWork& work, std::span<const Work> chunk, bool accumulate,
                  ShardWorkspace& ws) {
  const auto output_of = [&](const Work& w) { return work.presum ? w.row : w.route; };
  const int64_t num_outputs = NumOutputs(work), hidden = work.config->hidden;
  ws.term_begin.assign(num_outputs + 2, 0);
  for (const Work& w : chunk) ++ws.term_begin[output_of(w) + 2];
  for (int64_t i = 2; i <= num_outputs + 1; ++i) ws.term_begin[i] += ws.term_begin[i - 1];
  ws.terms.resize(chunk.size());
  ws.term_weights.resize(chunk.size());
  for (size_t i = 0; i < chunk.size(); ++i) {
    const int32_t term = ws.term_begin[output_of(chunk[i]) + 1]++;
    ws.terms[term] = ws.y.data() + static_cast<int64_t>(i) * hidden;
    ws.term_weights[term] = work.received->routes[chunk[i].route].weight;
  }
  kernels.weighted_sum({.terms = ws.terms.data(),
                        .weights = work.presum ? ws.term_weights.data() : nullptr,
                        .begin = ws.term_begin.data(),
                        .out = work.outputs,
                        .num_rows = num_outputs,
                        .dim = hidden,
                        .accumulate = accumulate},
                       executor);
}

}  // namespace

ShardWorkspace::ShardWorkspace(int64_t max_routes, int64_t hidden, int64_t intermediate,
                               const kernels::Executor& executor)
    : max_routes(max_routes),
      ffn(max_routes, intermediate, *executor.memory),
      gathered(max_routes, hidden, *executor.memory),
      y(max_routes * hidden, *executor.memory),
      row_codes(executor.staging),
      row_scales(executor.staging),
      term_begin(executor.staging),
      terms(executor.staging),
      term_weights(executor.staging) {}

void ExpertShard::Set(ExpertId expert, FfnWeights weights) {
  std::unique_ptr<FfnWeights>& place = experts_[base::Index(expert)];
  if (place == nullptr) ++num_experts_here_;
  place = std::make_unique<FfnWeights>(std::move(weights));
}

// The pairs to work on next, and their experts' groups: as many as the workspace holds and, where
// somebody wants to look between them, experts of about bytes_between.
std::span<const Work> ExpertShard::NextChunk(std::span<const Work> left, const ShardWork& work,
                                             ShardWorkspace& ws) const {
  const size_t max_size = std::min<size_t>(ws.max_routes, left.size());
  int64_t bytes = 0;
  size_t size = 0;
  ws.groups.clear();
  for (; size < max_size; ++size) {
    const bool new_expert = size == 0 || left[size].expert != left[size - 1].expert;
    if (new_expert) {
      if (work.between != nullptr && bytes >= ws.bytes_between) break;
      const FfnWeights* weights = experts_[base::Index(left[size].expert)].get();
      TERNION_CHECK(weights != nullptr);
      bytes += WeightBytes(*weights);
      ws.groups.push_back({weights, static_cast<int64_t>(size), 0});
    }
    ++ws.groups.back().num_rows;
  }
  return left.first(size);
}

absl::Status ExpertShard::Run(const kernels::Kernels& kernels, kernels::Executor& executor,
                              const ShardWork& work, ShardWorkspace& ws) const {
  SortByExpert(*work.received, static_cast<int>(experts_.size()), ws);
  if (ws.work.empty()) {
    kernels.zero({work.outputs, NumOutputs(work) * work.config->hidden}, executor);
  }
  for (std::span<const Work> left(ws.work); !left.empty();) {
    // Ops may still read what they were given for the chunk before.
    TERNION_RETURN_IF_ERROR(comm::Finish(kernels, executor));
    const bool first = left.size() == ws.work.size();
    const std::span<const Work> chunk = NextChunk(left, work, ws);
    left = left.subspan(chunk.size());
    const kernels::QuantizedRows x = GatherChunk(kernels, executor, *work.received, chunk, ws);
    RunFfn(kernels, executor, *work.config, x, ws.groups, ws.ffn, ws.y.data());
    AddToOutputs(kernels, executor, work, chunk, !first, ws);
    if (work.between != nullptr && !left.empty()) TERNION_RETURN_IF_ERROR((*work.between)());
  }
  return absl::OkStatus();
}

}  // namespace ternion::experts
