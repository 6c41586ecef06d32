#include "runtime/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "comm/finish.h"

namespace ternion::runtime {
namespace {

const float* OrNull(const base::Array<float>& vector) {
  return vector.size() > 0 ? vector.data() : nullptr;
}

// cos and sin of position * theta^(-2i / head_dim), the angle in fp32 as HF computes it.
void FillRotaryTables(const ModelConfig& config, int64_t max_positions,
                      base::Array<float>& cos_table, base::Array<float>& sin_table) {
  const int half = config.head_dim / 2;
  cos_table = base::Array<float>(max_positions * half);
  sin_table = base::Array<float>(max_positions * half);
  for (int i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    const float frequency =
        1.0f / static_cast<float>(std::pow(static_cast<double>(config.rope_theta), exponent));
    for (int64_t position = 0; position < max_positions; ++position) {
      const float angle = static_cast<float>(position) * frequency;
      cos_table[position * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sin_table[position * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

comm::ExchangeOptions MakeExchangeOptions(const ModelConfig& config, const ModelOptions& options) {
  return {.dispatch = *ResolveWire(config, options.wire).dispatch,
          .combine = options.wire.exact ? comm::RowFormat::kFp32 : options.wire.combine,
          .presum = !options.wire.exact,
          .act_bits = config.act_bits,
          .hidden = config.hidden,
          .max_rows = options.max_rows,
          .top_k = config.top_k,
          .num_experts = config.num_experts};
}

// A model that did not learn to live with so few KV bits needs its outliers spread over the head.
bool RotatesHeads(const ModelConfig& config, kernels::KvFormat kv) {
  return kernels::KvBits(kv) < std::min(8, config.kv_bits);
}

}  // namespace

WireOptions ResolveWire(const ModelConfig& config, WireOptions wire) {
  if (!wire.dispatch) {
    wire.dispatch = config.act_bits == 4 ? comm::RowFormat::kInt4 : comm::RowFormat::kInt8;
  }
  return wire;
}

absl::Status CheckPrecisions(const ModelConfig& config, const ModelOptions& options) {
  if (config.moe()) {
    TERNION_RETURN_IF_ERROR(comm::ValidateExchangeOptions(MakeExchangeOptions(config, options)));
  }
  const bool power_of_two = (config.head_dim & (config.head_dim - 1)) == 0;
  if (power_of_two || !RotatesHeads(config, options.kv)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("KV cache: ", kernels::KvFormatName(options.kv),
                   " rotates heads, which needs a head_dim that is a power of two, not ",
                   config.head_dim, "; choose bf16 or int8"));
}

Model::Model(const ModelConfig& config, std::shared_ptr<const experts::Placement> placement,
             const RankResources& resources, const ModelOptions& options)
    : config_(config),
      placement_(std::move(placement)),
      resources_(resources),
      options_(options),
      hidden_(options.max_rows * config.hidden, *resources.executor->memory),
      normed_(options.max_rows * config.hidden, *resources.executor->memory),
      q_(options.max_rows * config.q_dim(), *resources.executor->memory),
      k_(options.max_rows * config.kv_dim(), *resources.executor->memory),
      v_(options.max_rows * config.kv_dim(), *resources.executor->memory),
      attended_(options.max_rows * config.q_dim(), *resources.executor->memory),
      out_(options.max_rows * config.hidden, *resources.executor->memory),
      logit_rows_(kMaxLogitRows * config.hidden, *resources.executor->memory),
      logits_(kMaxLogitRows * config.vocab_size, *resources.executor->memory),
      sample_params_(kMaxLogitRows, *resources.executor->staging),
      sampled_(kMaxLogitRows, *resources.executor->staging),
      codes_(options.max_rows, config.hidden, *resources.executor->memory),
      attended_codes_(options.max_rows, config.q_dim(), *resources.executor->memory),
      tables_(options.max_rows, config.num_layers, *resources.executor),
      logit_ids_(kMaxLogitRows, *resources.executor->staging),
      sum_terms_(options.max_rows),
      sum_begin_(options.max_rows + 1),
      local_ffn_workspace_(options.max_rows, config.max_local_intermediate(),
                           *resources.executor->memory) {
  std::iota(sum_begin_.data(), sum_begin_.data() + sum_begin_.size(), 0);
  for (int64_t row = 0; row < options.max_rows; ++row) {
    sum_terms_[row] = out_.data() + row * config.hidden;
  }
  sum_terms_.MoveTo(*resources.executor->memory);
  sum_begin_.MoveTo(*resources.executor->memory);
}

absl::StatusOr<std::unique_ptr<Model>> Model::Load(
    const Checkpoint& checkpoint, std::shared_ptr<const experts::Placement> placement,
    const RankResources& resources, const ModelOptions& options, const LoadProgress& progress) {
  const ModelConfig& config = checkpoint.config();
  TERNION_RETURN_IF_ERROR(CheckPrecisions(config, options));
  if (options.hierarchical) {
    TERNION_RETURN_IF_ERROR(experts::NodeLayout::Make(*resources.transport).status());
  }
  std::unique_ptr<Model> model(new Model(config, std::move(placement), resources, options));
  TERNION_RETURN_IF_ERROR(model->LoadWeights(checkpoint, progress));
  model->SetPrecisions(options.wire, options.kv);
  return model;
}

void Model::SetPrecisions(const WireOptions& wire, kernels::KvFormat kv) {
  options_.wire = wire;
  options_.kv = kv;
  recordings_.clear();
  if (!config_.moe()) return;
  const experts::GateConfig gate = {config_.num_experts, config_.top_k, config_.renormalize};
  moe_ = std::make_unique<experts::MoeContext>(gate, MakeExchangeOptions(config_, options_),
                                               config_.expert_intermediate, resources_.transport,
                                               resources_.kernels, resources_.executor);
  if (UsesLocalExperts()) {
    moe_->UseLocalExperts(MakeExchangeOptions(config_, options_), config_.expert_intermediate);
  }
  if (options_.hierarchical && !wire.exact) {
    // Load has made sure that there is a layout.
    moe_->UseHierarchy(*experts::NodeLayout::Make(*resources_.transport),
                       MakeExchangeOptions(config_, options_), *placement_);
  }
}

// A sink reads the gate's choice on the host, as exchanges do.
bool Model::UsesLocalExperts() const {
  return config_.moe() && resources_.transport->size() == 1 && routing_sink_ == nullptr &&
         experts::LocalExperts::AreSupported(*resources_.kernels);
}

void Model::set_routing_sink(BatchRoutingSink sink) {
  routing_sink_ = std::move(sink);
  recordings_.clear();
  const bool has_local_experts = moe_ != nullptr && moe_->local != nullptr;
  if (has_local_experts && !UsesLocalExperts()) SetPrecisions(options_.wire, options_.kv);
}

void Model::SetMaxPositions(int64_t max_positions) {
  FillRotaryTables(config_, max_positions, cos_, sin_);
  cos_.MoveTo(*resources_.executor->memory);
  sin_.MoveTo(*resources_.executor->memory);
}

absl::Status Model::Forward(const Batch& batch) {
  TERNION_CHECK(batch.num_rows() <= options_.max_rows);
  // Ops of the step before read its tables until they are done.
  TERNION_RETURN_IF_ERROR(comm::Finish(*resources_.kernels, *resources_.executor));
  tables_.Write(batch);
  tables_.Upload(*resources_.kernels, *resources_.executor);
  return IsRecordable(batch) ? RunRecorded(batch) : RunLayers(batch);
}

// Whether the ops of such a step are the same whatever its rows hold, and few rows make calling
// them one by one take longer than what they do.
bool Model::IsRecordable(const Batch& batch) const {
  constexpr int64_t kMostRows = 64;
  return resources_.kernels->record != nullptr && batch.num_rows() > 0 &&
         batch.num_rows() <= kMostRows && batch.micro_batches == 1 &&
         (!config_.moe() || moe_->local != nullptr);
}

// A step of a kind that was there before is recorded, and from then on replayed.
absl::Status Model::RunRecorded(const Batch& batch) {
  constexpr size_t kMostRecordings = 64;  // some hundred KiB each
  if (recordings_.size() == kMostRecordings) recordings_.clear();
  const std::pair key(batch.num_rows(), tables_.max_tokens());
  const auto [at, is_new] = recordings_.try_emplace(key);
  if (is_new) return RunLayers(batch);
  kernels::Recording& recording = at->second;
  if (recording == nullptr) {
    absl::Status status;
    recording =
        resources_.kernels->record([&] { status = RunLayers(batch); }, *resources_.executor);
    TERNION_RETURN_IF_ERROR(status);
    if (recording == nullptr) return absl::InternalError("the device did not record a step");
  }
  resources_.kernels->replay(recording, *resources_.executor);
  return absl::OkStatus();
}

absl::Status Model::RunLayers(const Batch& batch) {
  resources_.kernels->embed({.table = embedding_.view,
                             .ids = tables_.tokens(),
                             .out = hidden_.data(),
                             .num_rows = batch.num_rows()},
                            *resources_.executor);
  std::array<Part, 2> parts;
  const int64_t count = config_.moe() ? batch.micro_batches : 1;
  for (int64_t i = 0; i < count; ++i) {
    parts[i].begin = batch.num_rows() * i / count;
    parts[i].num_rows = batch.num_rows() * (i + 1) / count - parts[i].begin;
    if (config_.moe()) parts[i].moe = &moe_->micro_batches[i];
    if (config_.moe()) parts[i].moe->alone = count == 1;
  }
  // Half a layer of each part at a time: the experts of one, and the attention of the next.
  TERNION_RETURN_IF_ERROR(Advance(batch, parts[0]));
  for (int layer = config_.num_dense_layers; layer < config_.num_layers; ++layer) {
    for (int64_t i = 0; i < count; ++i) {
      TERNION_RETURN_IF_ERROR(RunExperts(batch, layer, parts[i], parts[(i + 1) % count]));
    }
  }
  return count == 1 ? absl::OkStatus() : Advance(batch, parts[1]);
}

// Takes what the experts of the part's last layer returned, and goes on, through layers without
// experts, until its rows are on the way to those of the next.
absl::Status Model::Advance(const Batch& batch, Part& part) {
  if (part.next_layer > 0 && config_.has_experts(part.next_layer - 1)) {
    TERNION_RETURN_IF_ERROR(
        experts::MoeCombine(layers_[part.next_layer - 1].moe, *moe_, *part.moe, HiddenOf(part)));
  }
  while (part.next_layer < config_.num_layers) {
    const int layer = part.next_layer++;
    AttentionBlock(layers_[layer], layer, part);
    TERNION_RETURN_IF_ERROR(FfnBlock(layers_[layer], layer, batch, part));
    if (config_.has_experts(layer)) break;
  }
  return absl::OkStatus();
}

// Runs the experts of `layer` on the part's rows; `next` (the other part, or the same one when it
// is alone) goes on as soon as its own rows are back.
absl::Status Model::RunExperts(const Batch& batch, int layer, Part& part, Part& next) {
  const auto advance = [&] { return Advance(batch, next); };
  experts::TravellingBatch other = {next.moe, advance};
  if (next.next_layer == 0) {  // the second part sets out
    TERNION_RETURN_IF_ERROR(advance());
    other.carried_on = true;
  }
  TERNION_RETURN_IF_ERROR(experts::MoeExperts(layers_[layer].moe, *moe_, *part.moe,
                                              part.moe->alone ? nullptr : &other));
  return other.carried_on ? absl::OkStatus() : advance();
}

// out_ = o_proj(norm(attention(rope(q), rope(k), v))).
void Model::AttentionBlock(const LayerWeights& layer, int index, Part& part) {
  ProjectHeads(layer, part);
  AttendOverCache(index, part);
  const AttentionWeights& w = layer.attention;
  const int64_t rows = part.num_rows;
  const kernels::QuantizedRows attended = attended_codes_.rows(rows);
  resources_.kernels->quantize({.x = attended_.data(),
                                .weight = OrNull(w.sub_norm),
                                .out = attended,
                                .x_stride = config_.q_dim(),
                                .eps = config_.norm_eps,
                                .top_half = config_.act_bits == 4},
                               *resources_.executor);
  const kernels::TernaryGroup o[] = {{w.o.view, 0, rows, out_.data(), config_.hidden}};
  resources_.kernels->ternary_matmul({.x = attended, .groups = o}, *resources_.executor);
  part.out_waits = true;
}

// q_, k_ and v_ of the batch from hidden_; q and k normed where the family does, and turned to
// their positions.
void Model::ProjectHeads(const LayerWeights& layer, Part& part) {
  const AttentionWeights& w = layer.attention;
  const int64_t rows = part.num_rows;
  const kernels::QuantizedRows x = NormHidden(layer.input_norm, /*normed=*/nullptr, part);
  const kernels::TernaryGroup qkv[] = {{w.q.view, 0, rows, q_.data(), config_.q_dim()},
                                       {w.k.view, 0, rows, k_.data(), config_.kv_dim()},
                                       {w.v.view, 0, rows, v_.data(), config_.kv_dim()}};
  resources_.kernels->ternary_matmul({.x = x, .groups = qkv}, *resources_.executor);
  resources_.kernels->rope({.q = {q_.data(), OrNull(w.q_norm), config_.q_dim(), config_.heads},
                            .k = {k_.data(), OrNull(w.k_norm), config_.kv_dim(), config_.kv_heads},
                            .positions = tables_.positions() + part.begin,
                            .cos_table = cos_.data(),
                            .sin_table = sin_.data(),
                            .num_rows = rows,
                            .head_dim = config_.head_dim,
                            .eps = config_.norm_eps},
                           *resources_.executor);
}

// k_ and v_ into the cache, attended_ out of it. Rotating q and k alike leaves their scores; what
// rotating v does to the output is undone there.
void Model::AttendOverCache(int index, const Part& part) {
  const int64_t rows = part.num_rows;
  const int heads = config_.heads, kv_heads = config_.kv_heads, head_dim = config_.head_dim;
  const kernels::KvPage* const* pages = tables_.pages(index) + part.begin;
  const bool rotates = RotatesHeads(config_, options_.kv);
  if (rotates) {
    RotateHeads(q_.data(), heads, rows);
    RotateHeads(k_.data(), kv_heads, rows);
    RotateHeads(v_.data(), kv_heads, rows);
  }
  resources_.kernels->kv_store({.k = k_.data(),
                                .v = v_.data(),
                                .pages = pages,
                                .positions = tables_.positions() + part.begin,
                                .num_rows = rows,
                                .stride = config_.kv_dim(),
                                .kv_heads = kv_heads,
                                .head_dim = head_dim,
                                .format = options_.kv},
                               *resources_.executor);
  resources_.kernels->attention({.q = q_.data(),
                                 .pages = pages,
                                 .positions = tables_.positions() + part.begin,
                                 .out = attended_.data(),
                                 .num_rows = rows,
                                 .max_tokens = tables_.max_tokens(),
                                 .q_stride = config_.q_dim(),
                                 .out_stride = config_.q_dim(),
                                 .heads = heads,
                                 .kv_heads = kv_heads,
                                 .head_dim = head_dim,
                                 .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
                                 .format = options_.kv},
                                *resources_.executor);
  if (rotates) RotateHeads(attended_.data(), heads, rows);
}

// h += FFN(norm(h)), or what is to be added is left in out_: the dense MLP, or the shared expert;
// the rows of routed experts are on the way when this returns, and what they add comes with
// MoeCombine.
absl::Status Model::FfnBlock(const LayerWeights& layer, int index, const Batch& batch, Part& part) {
  float* const normed = normed_.data() + part.begin * config_.hidden;
  const bool has_experts = config_.has_experts(index);
  const kernels::QuantizedRows x =
      NormHidden(layer.post_attention_norm, has_experts ? normed : nullptr, part);
  if (has_experts) {
    const int expert_layer = index - config_.num_dense_layers;
    const experts::MoeInput input = {x, normed, batch.step, static_cast<uint32_t>(expert_layer)};
    TERNION_RETURN_IF_ERROR(experts::MoeDispatch(layer.moe, *placement_, input, *moe_, *part.moe));
    if (routing_sink_) {
      const size_t num_routes = part.num_rows * config_.top_k;
      routing_sink_(expert_layer, part.begin, moe_->experts.span().first(num_routes));
    }
  }
  if (const int64_t intermediate = config_.local_intermediate(index); intermediate > 0) {
    const experts::FfnConfig ffn = {config_.hidden, intermediate, config_.activation,
                                    OrNull(layer.local_sub_norm), config_.norm_eps};
    const experts::FfnGroup all_rows[] = {{&layer.local_ffn, 0, part.num_rows}};
    experts::RunFfn(*resources_.kernels, *resources_.executor, ffn, x, all_rows,
                    local_ffn_workspace_, out_.data());
    part.out_waits = true;
    // Experts add to the same rows, and Logits reads them.
    if (has_experts || index + 1 == config_.num_layers) AddOutToHidden(part);
  }
  return absl::OkStatus();
}

// What the next block works on: codes of the part's rows, normed, and these as floats. What waits
// in out_ is added first.
kernels::QuantizedRows Model::NormHidden(const base::Array<float>& norm, float* normed,
                                         Part& part) {
  const kernels::QuantizedRows codes =
      codes_.rows(part.begin + part.num_rows).Slice(part.begin, part.num_rows);
  const bool adds = std::exchange(part.out_waits, false);
  resources_.kernels->quantize({.x = HiddenOf(part),
                                .weight = norm.data(),
                                .normed = normed,
                                .out = codes,
                                .x_stride = config_.hidden,
                                .eps = config_.norm_eps,
                                .bits = config_.act_bits,
                                .join = adds ? kernels::Join::kAdd : kernels::Join::kNothing,
                                .y = out_.data(),
                                .joined = HiddenOf(part)},
                               *resources_.executor);
  return codes;
}

void Model::RotateHeads(float* vectors, int num_heads, int64_t num_rows) {
  resources_.kernels->hadamard({.x = vectors,
                                .num_rows = num_rows,
                                .stride = int64_t{num_heads} * config_.head_dim,
                                .heads = num_heads,
                                .head_dim = config_.head_dim},
                               *resources_.executor);
}

void Model::AddOutToHidden(Part& part) {
  part.out_waits = false;
  resources_.kernels->weighted_sum({.terms = sum_terms_.data(),
                                    .begin = sum_begin_.data(),
                                    .out = HiddenOf(part),
                                    .num_rows = part.num_rows,
                                    .dim = config_.hidden,
                                    .accumulate = true},
                                   *resources_.executor);
}

void Model::Head(std::span<const int32_t> rows) {
  const int64_t count = static_cast<int64_t>(rows.size());
  TERNION_CHECK(count <= kMaxLogitRows);
  const int64_t hidden = config_.hidden;
  std::copy(rows.begin(), rows.end(), logit_ids_.data());
  resources_.kernels->encode_rows({.x = hidden_.data(),
                                   .rows = logit_ids_.data(),
                                   .out = reinterpret_cast<uint8_t*>(logit_rows_.data()),
                                   .num_rows = count,
                                   .dim = hidden,
                                   .x_stride = hidden,
                                   .format = kernels::RowFormat::kFp32},
                                  *resources_.executor);
  resources_.kernels->rms_norm({.x = logit_rows_.data(),
                                .weight = final_norm_.data(),
                                .out = logit_rows_.data(),
                                .num_rows = count,
                                .dim = hidden,
                                .x_stride = hidden,
                                .out_stride = hidden,
                                .eps = config_.norm_eps},
                               *resources_.executor);
  const kernels::DenseMatrix& head = config_.tied_embeddings ? embedding_.view : head_.view;
  resources_.kernels->dense_matmul({.x = logit_rows_.data(),
                                    .weights = head,
                                    .y = logits_.data(),
                                    .num_rows = count,
                                    .x_stride = hidden,
                                    .y_stride = head.rows},
                                   *resources_.executor);
  num_logit_rows_ = count;
}

absl::StatusOr<std::span<const int32_t>> Model::Sample(
    std::span<const kernels::SampleParams> params) {
  TERNION_CHECK(static_cast<int64_t>(params.size()) == num_logit_rows_);
  std::copy(params.begin(), params.end(), sample_params_.data());
  resources_.kernels->sample({.logits = logits_.data(),
                              .params = sample_params_.data(),
                              .tokens = sampled_.data(),
                              .num_rows = num_logit_rows_,
                              .vocab = config_.vocab_size},
                             *resources_.executor);
  TERNION_RETURN_IF_ERROR(comm::Finish(*resources_.kernels, *resources_.executor));
  return sampled_.span().first(params.size());
}

absl::StatusOr<std::span<const float>> Model::Logits() {
  const int64_t count = num_logit_rows_ * config_.vocab_size;
  base::Array<float>* logits = &logits_;
  if (resources_.kernels->copy != nullptr) {
    logits = &logits_of_host_;
    if (logits->size() == 0) {
      *logits = base::Array<float>(logits_.size(), *resources_.executor->staging);
    }
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    resources_.kernels->copy({logits_.data(), logits->data(), bytes}, *resources_.executor);
  }
  TERNION_RETURN_IF_ERROR(comm::Finish(*resources_.kernels, *resources_.executor));
  return logits->span().first(count);
}

}  // namespace ternion::runtime
