// What config.json says, checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace ternion::runtime {

// How ternary weights lie on disk (FORMATS.md, Packed ternary).
struct QuantizationConfig {
  bool online = false;  // float master weights, ternarized at load; else packed codes
  bool scale_divides =
      false;  // weight_scale is 1/g (linear_class bitlinear), else g (autobitlinear)
};

// Families: bitnet (dense), bitnet_moe, qwen3_moe with the bitnet quantizer.
struct ModelConfig {
  std::string model_type;
  int64_t vocab_size = 0;
  int64_t hidden = 0;
  int num_layers = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int64_t max_positions = 0;
  float rope_theta = 10000;
  float norm_eps = 1e-6f;
  kernels::Activation activation = kernels::Activation::kSilu;
  bool tied_embeddings = false;
  bool sub_norms = false;  // attn_sub_norm and ffn_sub_norm (bitnet, bitnet_moe)
  bool qk_norms = false;   // q_norm and k_norm per head (qwen3_moe)

  int num_dense_layers = 0;        // first_k_dense_replace: the first ones; all of a dense model
  int64_t dense_intermediate = 0;  // of their MLP
  int num_experts = 0;             // of each of the other layers
  int top_k = 0;
  int64_t expert_intermediate = 0;
  int64_t shared_intermediate = 0;  // of the shared expert; 0: none
  bool renormalize = false;         // norm_topk_prob
  int act_bits = 8;                 // 8 (b1.58) or 4 (a4.8: NUMERICS.md)
  int kv_bits = 16;                 // 16, 8, 4 or 3: what the model was trained with

  QuantizationConfig quantization;
  // "random_weights_seed": no file holds the weights, they are drawn (runtime/random_weights.h).
  std::optional<uint64_t> random_seed;
  int32_t bos_id = -1;           // put before every text; -1: the family's texts start without
  std::vector<int32_t> eos_ids;  // generation ends on any of them

  bool moe() const { return num_experts > 0; }
  bool has_experts(int layer) const { return layer >= num_dense_layers; }
  // Placements and routing traces count these layers alone, from 0.
  int num_expert_layers() const { return num_layers - num_dense_layers; }
  int64_t q_dim() const { return int64_t{heads} * head_dim; }
  int64_t kv_dim() const { return int64_t{kv_heads} * head_dim; }
  // Of what all rows of a layer go through: its dense MLP, or the shared expert; 0: there is none.
  int64_t local_intermediate(int layer) const {
    return has_experts(layer) ? shared_intermediate : dense_intermediate;
  }
  // The widest of them: sizes workspaces.
  int64_t max_local_intermediate() const {
    return std::max(dense_intermediate, shared_intermediate);
  }
};

// Checks every number's range and that they fit together; refuses what the runtime does not do
// (another model_type, rope scaling, biases, other activation bits). InvalidArgument or
// Unimplemented, naming the key.
absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& json_text);

// DIR/config.json, with eos ids from DIR/generation_config.json when that exists.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory);

}  // namespace ternion::runtime
