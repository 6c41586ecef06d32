#include "tests/comm/exchange_case.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "base/check.h"
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

// What is left of rows of `dim` after they travelled at `format`.
void Travel(RowFormat format, int64_t dim, std::vector<float>* rows) {
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  const kernels::Kernels& kernels = *kernels::SelectCpuKernels("scalar");
  const int64_t num_rows = static_cast<int64_t>(rows->size()) / dim;
  std::vector<uint8_t> wire(num_rows * kernels::EncodedRowBytes(format, dim));
  kernels.encode_rows({rows->data(), nullptr, wire.data(), num_rows, dim, dim, format}, executor);
  kernels.decode_rows({wire.data(), rows->data(), num_rows, dim, format}, executor);
}

// The codes a rank's rows have when the experts multiply them; `on_wire`: after travelling.
kernels::QuantizedBuffer QuantizeBatch(const ExchangeCase& c, const RankBatch& batch,
                                       bool on_wire) {
  const int64_t hidden = c.options.hidden;
  std::vector<float> x = batch.x;
  if (on_wire && c.options.dispatch == RowFormat::kBf16) Travel(RowFormat::kBf16, hidden, &x);
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

DispatchPlan MakePlan(const ExchangeCase& c, const RankBatch& batch, int begin, int end) {
  DispatchPlan plan;
  for (int rank = 0; rank < c.num_ranks; ++rank) {
    plan.rank_begin.push_back(plan.rows.size());
    for (const RankBatch::Choice& choice : batch.choices) {
      if (choice.rank != rank || choice.row < begin || choice.row >= end) continue;
      const int source = choice.row - begin;
      const bool is_new = plan.rank_begin.back() == static_cast<int32_t>(plan.rows.size()) ||
                          plan.rows.back().source != source;
      if (is_new) plan.rows.push_back({source, static_cast<int32_t>(plan.routes.size()), 0});
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
  for (size_t slot = 0; slot < used.size(); ++slot) {
    if (!used[slot]) continue;
    one.assign(&sums[slot * hidden], &sums[slot * hidden] + hidden);
    if (static_cast<int>(slot % c.num_ranks) != rank) Travel(c.options.combine, hidden, &one);
    AddScaled(one, 1, &out[slot / c.num_ranks * hidden]);
  }
  return out;
}

ExchangeOptions OptionsOf(const ExchangeCase& c, int micro_batch) {
  ExchangeOptions options = c.options;
  options.micro_batch = micro_batch;
  return options;
}

// One micro-batch of a rank on its way through the layers.
class Half {
 public:
  Half(const ExchangeCase& c, int index, Transport* transport, kernels::Executor* executor,
       std::vector<std::vector<float>>* outs)
      : case_(c),
        index_(index),
        rank_(base::Index(transport->rank())),
        exchange_(OptionsOf(c, index), transport, kernels::SelectCpuKernels(""), executor),
        outs_(*outs) {}

  Exchange& exchange() { return exchange_; }
  bool has_started() const { return next_layer_ > 0; }

  // Takes the last layer's rows and sends off the next one's.
  absl::Status Advance() {
    const int layer = next_layer_++;
    const int64_t hidden = case_.options.hidden;
    if (layer > 0) {
      TERNION_RETURN_IF_ERROR(exchange_.CombineRecv(outs_[layer - 1].data() + begin_ * hidden));
    }
    if (layer == case_.num_layers) return absl::OkStatus();
    batch_ = MakeBatch(case_, layer, rank_);
    outs_[layer].resize(batch_.x.size());
    begin_ = batch_.num_rows * index_ / case_.micro_batches;
    const int end = batch_.num_rows * (index_ + 1) / case_.micro_batches;
    std::copy(batch_.residual.data() + begin_ * hidden, batch_.residual.data() + end * hidden,
              outs_[layer].data() + begin_ * hidden);
    codes_ = QuantizeBatch(case_, batch_, false);
    outputs_.clear();
    return exchange_.DispatchSend(
        7, layer, MakePlan(case_, batch_, begin_, end),
        codes_.rows(batch_.num_rows).Slice(begin_, end - begin_),
        exchange_.NeedsNormed() ? batch_.x.data() + begin_ * hidden : nullptr);
  }

  // Runs the experts; `other`, if there is one, goes on once its rows are back.
  absl::Status RunExperts(Half* other) {
    while (true) {
      TERNION_ASSIGN_OR_RETURN(
          const ReceivedRows* received,
          exchange_.DispatchRecv(case_.min_routes, other == nullptr ? nullptr : &other->exchange_));
      if (received == nullptr) break;
      if (!received->rows.empty()) {
        outputs_.push_back(RunFakeExperts(case_.options, *received));
        TERNION_RETURN_IF_ERROR(exchange_.CombineSend(outputs_.back().data()));
      } else {
        TERNION_CHECK(other != nullptr);
        TERNION_RETURN_IF_ERROR(other->Advance());
        other = nullptr;
      }
    }
    return other == nullptr ? absl::OkStatus() : other->Advance();
  }

 private:
  const ExchangeCase& case_;
  const int index_;
  const int rank_;
  Exchange exchange_;
  std::vector<std::vector<float>>& outs_;
  int next_layer_ = 0;
  int begin_ = 0;
  RankBatch batch_;
  kernels::QuantizedBuffer codes_;
  std::vector<std::vector<float>> outputs_;  // stay until CombineRecv
};

absl::Status RunRank(const ExchangeCase& c, Transport& transport,
                     std::vector<std::vector<float>>* outs) {
  base::ThreadPool threads(2);
  kernels::Executor executor{.threads = &threads};
  outs->assign(c.num_layers, {});
  Half first(c, 0, &transport, &executor, outs);
  Half second(c, 1, &transport, &executor, outs);
  TERNION_RETURN_IF_ERROR(first.Advance());
  for (int layer = 0; layer < c.num_layers; ++layer) {
    if (c.micro_batches == 1) {
      TERNION_RETURN_IF_ERROR(first.RunExperts(nullptr));
      TERNION_RETURN_IF_ERROR(first.Advance());
      continue;
    }
    const bool starts = !second.has_started();
    if (starts) TERNION_RETURN_IF_ERROR(second.Advance());
    TERNION_RETURN_IF_ERROR(first.RunExperts(starts ? nullptr : &second));
    TERNION_RETURN_IF_ERROR(second.RunExperts(&first));
  }
  return c.micro_batches == 1 ? absl::OkStatus() : second.Advance();
}

}  // namespace ternion::comm
