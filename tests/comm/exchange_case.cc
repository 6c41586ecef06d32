#include "tests/comm/exchange_case.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "base/status.h"
#include "kernels/activations.h"
#include "kernels/select.h"

namespace ternion::comm {
namespace {

// The rank that serves `expert` to `asking` rank; experts have one or two replicas.
int HolderOf(const ExchangeCase& c, int layer, int expert, int asking) {
  std::mt19937 random(c.placement_seed * 7919 + layer * 131 + expert);
  const int first = random() % c.num_ranks;
  const int second = random() % c.num_ranks;
  return asking % 2 == 0 ? first : second;
}

// The codes a rank's rows have when the experts multiply them; `on_wire`: after travelling.
kernels::QuantizedBuffer QuantizeBatch(const ExchangeCase& c, const RankBatch& batch,
                                       bool on_wire) {
  const int64_t hidden = c.options.hidden;
  std::vector<float> x = batch.x;
  if (on_wire && c.options.dispatch == RowFormat::kBf16) {
    std::vector<uint8_t> bytes(x.size() * 2);
    EncodeBf16(x.data(), x.size(), bytes.data());
    DecodeBf16(bytes.data(), x.size(), x.data());
  }
  kernels::QuantizedBuffer buffer(batch.num_rows, hidden);
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  kernels::SelectCpuKernels("")->quantize({.x = x.data(),
                                           .out = buffer.rows(batch.num_rows),
                                           .x_stride = hidden,
                                           .bits = c.options.act_bits},
                                          executor);
  return buffer;
}

void AddScaled(const std::vector<float>& row, float weight, float* out) {
  for (size_t i = 0; i < row.size(); ++i) out[i] += weight * row[i];
}

}  // namespace

RankBatch MakeBatch(const ExchangeCase& c, int layer, int rank) {
  std::mt19937 random(c.seed * 65537 + layer * 257 + rank);
  std::normal_distribution<float> normal;
  RankBatch batch;
  batch.num_rows = random() % (c.options.max_rows + 1);
  batch.x.resize(batch.num_rows * c.options.hidden);
  batch.residual.resize(batch.x.size());
  for (float& value : batch.x) value = normal(random);
  for (float& value : batch.residual) value = normal(random);
  std::vector<int> experts(c.options.num_experts);
  std::iota(experts.begin(), experts.end(), 0);
  for (int row = 0; row < batch.num_rows; ++row) {
    std::shuffle(experts.begin(), experts.end(), random);
    std::vector<int> chosen(experts.begin(), experts.begin() + c.options.top_k);
    std::sort(chosen.begin(), chosen.end());
    for (int expert : chosen) {
      const float weight = static_cast<float>(random() % 1000) / 999.0f;
      batch.choices.push_back({row, {ExpertId{expert}, weight}, HolderOf(c, layer, expert, rank)});
    }
  }
  return batch;
}

DispatchPlan MakePlan(const ExchangeCase& c, const RankBatch& batch) {
  DispatchPlan plan;
  for (int rank = 0; rank < c.num_ranks; ++rank) {
    plan.rank_begin.push_back(plan.rows.size());
    for (const RankBatch::Choice& choice : batch.choices) {
      if (choice.rank != rank) continue;
      const bool is_new = plan.rank_begin.back() == static_cast<int32_t>(plan.rows.size()) ||
                          plan.rows.back().source != choice.row;
      if (is_new) plan.rows.push_back({choice.row, static_cast<int32_t>(plan.routes.size()), 0});
      plan.routes.push_back(choice.route);
      ++plan.rows.back().num_routes;
    }
  }
  plan.rank_begin.push_back(plan.rows.size());
  return plan;
}

void RunFakeExpert(ExpertId expert, const int8_t* codes, float scale, int64_t hidden, float* out) {
  const int id = base::Index(expert);
  for (int64_t i = 0; i < hidden; ++i) {
    out[i] = static_cast<float>(codes[i] + codes[(i + id) % hidden]) * (scale / (1.5f + id));
  }
}

std::vector<float> RunFakeExperts(const ExchangeOptions& options, const ReceivedRows& received) {
  const int64_t hidden = options.hidden;
  std::vector<float> outputs((options.presum ? received.rows.size() : received.routes.size()) *
                             hidden);
  std::vector<float> one(hidden);
  for (size_t i = 0; i < received.rows.size(); ++i) {
    const ReceivedRow& row = received.rows[i];
    for (int32_t j = row.first_route; j < row.first_route + row.num_routes; ++j) {
      const Route& route = received.routes[j];
      RunFakeExpert(route.expert, row.codes, row.scale, hidden, one.data());
      if (options.presum) {
        AddScaled(one, route.weight, &outputs[i * hidden]);
      } else {
        std::copy(one.begin(), one.end(), &outputs[j * hidden]);
      }
    }
  }
  return outputs;
}

std::vector<float> ReferenceOut(const ExchangeCase& c, int layer, int rank) {
  const int64_t hidden = c.options.hidden;
  const RankBatch batch = MakeBatch(c, layer, rank);
  kernels::QuantizedBuffer own = QuantizeBatch(c, batch, false);
  kernels::QuantizedBuffer remote = QuantizeBatch(c, batch, true);
  std::vector<float> out = batch.residual;
  std::vector<float> one(hidden);
  // Sums of each (row, rank) for presum.
  std::vector<float> sums(out.size() * c.num_ranks);
  std::vector<bool> used(static_cast<size_t>(batch.num_rows) * c.num_ranks);
  for (const RankBatch::Choice& choice : batch.choices) {
    const auto codes = (choice.rank == rank ? own : remote).rows(batch.num_rows);
    RunFakeExpert(choice.route.expert, codes.codes + choice.row * codes.stride,
                  codes.scales[choice.row], hidden, one.data());
    const int64_t slot = int64_t{choice.row} * c.num_ranks + choice.rank;
    used[slot] = true;
    AddScaled(one, choice.route.weight,
              c.options.presum ? &sums[slot * hidden] : &out[choice.row * hidden]);
  }
  if (!c.options.presum) return out;
  std::vector<uint8_t> wire(CombineRowBytes(c.options.combine, hidden));
  for (size_t slot = 0; slot < used.size(); ++slot) {
    if (!used[slot]) continue;
    one.assign(&sums[slot * hidden], &sums[slot * hidden] + hidden);
    if (static_cast<int>(slot % c.num_ranks) != rank) {
      EncodeCombineRow(c.options.combine, one.data(), hidden, wire.data());
      DecodeCombineRow(c.options.combine, wire.data(), hidden, one.data());
    }
    AddScaled(one, 1, &out[slot / c.num_ranks * hidden]);
  }
  return out;
}

absl::Status RunRank(const ExchangeCase& c, Transport& transport,
                     std::vector<std::vector<float>>* outs) {
  base::ThreadPool threads(2);
  kernels::Executor executor{.threads = &threads};
  Exchange exchange(c.options, &transport, kernels::SelectCpuKernels(""), &executor);
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const RankBatch batch = MakeBatch(c, layer, base::Index(transport.rank()));
    kernels::QuantizedBuffer codes = QuantizeBatch(c, batch, false);
    TERNION_RETURN_IF_ERROR(
        exchange.DispatchSend(7, layer, MakePlan(c, batch), codes.rows(batch.num_rows),
                              exchange.NeedsNormed() ? batch.x.data() : nullptr));
    TERNION_ASSIGN_OR_RETURN(const ReceivedRows* received, exchange.DispatchRecv());
    const std::vector<float> outputs = RunFakeExperts(c.options, *received);
    TERNION_RETURN_IF_ERROR(exchange.CombineSend(outputs.data()));
    outs->push_back(batch.residual);
    TERNION_RETURN_IF_ERROR(exchange.CombineRecv(outs->back().data()));
  }
  return absl::OkStatus();
}

}  // namespace ternion::comm
