// The transformer: weights of this rank and the forward pass.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "experts/ffn.h"
#include "experts/moe_layer.h"
#include "experts/placement.h"
#include "runtime/checkpoint.h"
#include "runtime/kv_cache.h"
#include "runtime/step_tables.h"

namespace ternion::runtime {

// Precision of the activation exchange. `exact` is --wire exact: fp32 rows per expert, summed at
// the owner.
struct WireOptions {
  // None: the model's own activation width, lossless.
  std::optional<comm::RowFormat> dispatch = std::nullopt;
  comm::RowFormat combine = comm::RowFormat::kBf16;
  bool exact = false;
};

struct ModelOptions {
  int64_t max_rows = 0;                  // of one step on this rank
  int64_t room_for_weights = INT64_MAX;  // bytes; what does not fit is packed smaller if it can be
  WireOptions wire;
  kernels::KvFormat kv = kernels::KvFormat::kBf16;
  bool hierarchical = false;  // rows cross between nodes once and fan out inside; not for `exact`
};

// What `wire` leaves open, from the model.
WireOptions ResolveWire(const ModelConfig& config, WireOptions wire);

// InvalidArgument when the model cannot run with these precisions: int4 dispatch would round its
// activations; an int4 or int3 KV cache rotates heads (NUMERICS.md) that have no power of two of
// elements. Looks at `options.max_rows`, `wire` and `kv`.
absl::Status CheckPrecisions(const ModelConfig& config, const ModelOptions& options);

// What a rank works with. All outlive the model.
struct RankResources {
  comm::Transport* transport = nullptr;
  const kernels::Kernels* kernels = nullptr;
  kernels::Executor* executor = nullptr;
};

// Called from one thread while loading: matrices done, of how many.
using LoadProgress = std::function<void(int64_t done, int64_t total)>;

struct AttentionWeights {
  kernels::OwnedTernaryMatrix q, k, v;  // [heads * head_dim | kv_heads * head_dim, hidden]
  kernels::OwnedTernaryMatrix o;        // [hidden, heads * head_dim]
  base::Array<float> q_norm, k_norm;    // [head_dim], or empty
  base::Array<float> sub_norm;          // [heads * head_dim], or empty
};

struct LayerWeights {
  base::Array<float> input_norm;  // [hidden]
  AttentionWeights attention;
  base::Array<float> post_attention_norm;  // [hidden]
  experts::FfnWeights local_ffn;           // the dense MLP or the shared expert, if there is one
  base::Array<float> local_sub_norm;       // [its intermediate], or empty
  OwnedDenseMatrix gate;                   // [experts, hidden], if the layer has experts
  base::Array<float> expert_sub_norm;      // [expert_intermediate], or empty
  experts::MoeLayerWeights moe;            // views of the two above, and this rank's experts
};

// What of a rank's weights is of which kind. Norms, a few vectors, are left out.
struct WeightSizes {
  struct Ternary {
    int64_t weights = 0;
    int64_t bytes = 0;  // of their codes, padded as they lie
  };
  Ternary attention;  // q, k, v and o
  Ternary local_ffn;  // dense MLPs, or shared experts
  Ternary experts;    // those of this rank
  int64_t gate_bytes = 0;
  int64_t embedding_bytes = 0;
  int64_t head_bytes = 0;  // 0 when tied to the embedding

  int64_t bytes() const {
    return attention.bytes + local_ffn.bytes + experts.bytes + gate_bytes + embedding_bytes +
           head_bytes;
  }
};

// Hears which experts the gate of `layer` (of those with experts) chose for the batch's rows from
// `first_row` on: [rows, top_k], distinct in a row.
using BatchRoutingSink =
    std::function<void(int layer, int64_t first_row, std::span<const int32_t> experts)>;

// One thread. Forward is collective in a MoE model: all ranks call it equally often.
class Model {
 public:
  // Reads this rank's share: everything but experts placed elsewhere. Every rank checks the names
  // and shapes of all experts, so that a wrong checkpoint is the same error everywhere.
  static absl::StatusOr<std::unique_ptr<Model>> Load(
      const Checkpoint& checkpoint, std::shared_ptr<const experts::Placement> placement,
      const RankResources& resources, const ModelOptions& options, const LoadProgress& progress);

  // Makes room for positions 0 .. max_positions - 1. Once, before the first step that has rows.
  void SetMaxPositions(int64_t max_positions);

  // Runs all layers over the batch and keeps the last hidden rows for Head. May have no rows.
  absl::Status Forward(const Batch& batch);

  // Makes logits of these rows of the last batch; at most kMaxLogitRows at a time. They stay where
  // ops are done, for the two below.
  static constexpr int64_t kMaxLogitRows = 32;
  void Head(std::span<const int32_t> rows);
  // A token for each of Head's rows, valid until the next.
  absl::StatusOr<std::span<const int32_t>> Sample(std::span<const kernels::SampleParams> params);
  // Head's logits [rows, vocab] on the host, valid until the next Head.
  absl::StatusOr<std::span<const float>> Logits();

  // Other precisions from the next Forward on, over the same weights; its pages have format `kv`.
  // They passed CheckPrecisions.
  void SetPrecisions(const WireOptions& wire, kernels::KvFormat kv);

  // Setting one may allocate; taking it back (null) does not, and a device goes on as with a sink.
  void set_routing_sink(BatchRoutingSink sink);
  const experts::Placement& placement() const { return *placement_; }

  int64_t weight_bytes() const { return weight_bytes_; }            // held by this rank
  int64_t num_local_experts() const { return num_local_experts_; }  // over all layers
  WeightSizes weight_sizes() const;

 private:
  Model(const ModelConfig& config, std::shared_ptr<const experts::Placement> placement,
        const RankResources& resources, const ModelOptions& options);

  absl::Status LoadWeights(const Checkpoint& checkpoint, const LoadProgress& progress);
  // Consecutive rows of the batch that go through the layers together, as one micro-batch.
  struct Part {
    int64_t begin = 0;
    int64_t num_rows = 0;
    experts::MicroBatch* moe = nullptr;
    int next_layer = 0;      // whose attention comes next
    bool out_waits = false;  // out_ holds what is still to be added to its rows of hidden_
  };

  bool UsesLocalExperts() const;
  bool IsRecordable(const Batch& batch) const;
  absl::Status RunLayers(const Batch& batch);
  absl::Status RunRecorded(const Batch& batch);
  absl::Status Advance(const Batch& batch, Part& part);
  absl::Status RunExperts(const Batch& batch, int layer, Part& part, Part& other);
  void AttentionBlock(const LayerWeights& layer, int index, Part& part);
  void ProjectHeads(const LayerWeights& layer, Part& part);
  void AttendOverCache(int index, const Part& part);
  absl::Status FfnBlock(const LayerWeights& layer, int index, const Batch& batch, Part& part);
  kernels::QuantizedRows NormHidden(const base::Array<float>& norm, float* normed, Part& part);
  void RotateHeads(float* vectors, int num_heads, int64_t num_rows);
  void AddOutToHidden(Part& part);
  float* HiddenOf(const Part& part) { return hidden_.data() + part.begin * config_.hidden; }

  const ModelConfig config_;
  const std::shared_ptr<const experts::Placement> placement_;
  const RankResources resources_;
  ModelOptions options_;

  OwnedDenseMatrix embedding_;  // [vocab, hidden]
  OwnedDenseMatrix head_;       // [vocab, hidden], empty when tied
  base::Array<float> final_norm_;
  std::vector<LayerWeights> layers_;
  int64_t weight_bytes_ = 0;
  int64_t num_local_experts_ = 0;

  // Workspace, sized for options_.max_rows before the first step. hidden_, normed_ and codes_ hold
  // the rows of all parts; the rest is one part's.
  base::Array<float> cos_, sin_;       // [max_positions, head_dim / 2]
  base::Array<float> hidden_;          // [rows, hidden] the residual stream
  base::Array<float> normed_;          // [rows, hidden]
  base::Array<float> q_, k_, v_;       // [rows, q_dim | kv_dim]
  base::Array<float> attended_;        // [rows, q_dim]
  base::Array<float> out_;             // [rows, hidden] of o_proj and of the local FFN
  base::Array<float> logit_rows_;      // [kMaxLogitRows, hidden]
  base::Array<float> logits_;          // [kMaxLogitRows, vocab]
  base::Array<float> logits_of_host_;  // the same in staging, once somebody asked for them
  base::Array<kernels::SampleParams> sample_params_;  // [kMaxLogitRows]
  base::Array<int32_t> sampled_;                      // [kMaxLogitRows]
  int64_t num_logit_rows_ = 0;
  kernels::QuantizedBuffer codes_;           // [rows, hidden]
  kernels::QuantizedBuffer attended_codes_;  // [rows, q_dim]
  StepTables tables_;
  base::Array<int32_t> logit_ids_;       // [kMaxLogitRows] rows of hidden_
  base::Array<const float*> sum_terms_;  // [rows] rows of out_
  base::Array<int32_t> sum_begin_;       // [rows + 1] 0, 1, 2, ...
  experts::FfnWorkspace local_ffn_workspace_;
  std::unique_ptr<experts::MoeContext> moe_;
  BatchRoutingSink routing_sink_;
  std::map<std::pair<int64_t, int64_t>, kernels::Recording> recordings_;  // [rows, tables' tokens]
};

}  // namespace ternion::runtime
