#include "runtime/random_weights.h"

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/checked.h"
#include "base/random.h"
#include "kernels/ternary_draw.h"

namespace ternion::runtime {
namespace {

using Fill = RandomTensor::Fill;

// Roughly normal, unit variance: a sum of four 16-bit uniforms.
float NormalOf(uint64_t bits) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>((bits >> (16 * i)) & 0xffff) * 0x1p-16f;
  return (sum - 2.0f) * std::sqrt(3.0f);
}

constexpr auto kBytes = [] {
  std::array<uint8_t, kernels::kTernaryBytes> bytes{};
  for (uint32_t i = 0; i < kernels::kTernaryBytes; ++i) bytes[i] = kernels::ByteOfChoice(i);
  return bytes;
}();

uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

class TensorList {
 public:
  // A scale that keeps the variance: a third of the weights are zero, inputs are normed.
  void Ternary(const std::string& name, int64_t rows, int64_t columns) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(columns) * 2.0f / 3.0f);
    Add(name + ".weight", DType::kU8, {base::CeilDiv(rows, 4), columns}, Fill::kTernary, 0);
    Add(name + ".weight_scale", DType::kF32, {1}, Fill::kScale, scale);
  }
  void Norm(const std::string& name, int64_t size) {
    Add(name + ".weight", DType::kBf16, {size}, Fill::kOnes, 1);
  }
  void Normal(const std::string& name, int64_t rows, int64_t columns, float deviation) {
    Add(name + ".weight", DType::kBf16, {rows, columns}, Fill::kNormal, deviation);
  }
  void Ffn(const std::string& name, int64_t hidden, int64_t intermediate) {
    Ternary(name + ".gate_proj", intermediate, hidden);
    Ternary(name + ".up_proj", intermediate, hidden);
    Ternary(name + ".down_proj", hidden, intermediate);
  }
  std::vector<RandomTensor> Take() { return std::move(tensors_); }

 private:
  void Add(std::string name, DType dtype, std::vector<int64_t> shape, Fill fill, float value) {
    tensors_.push_back({{std::move(name), dtype, std::move(shape)}, fill, value, next_draw_});
    const int64_t bytes = tensors_.back().bytes();
    if (fill == Fill::kTernary) next_draw_ += bytes;
    if (fill == Fill::kNormal) next_draw_ += bytes / DTypeBytes(dtype);
  }

  std::vector<RandomTensor> tensors_;
  uint64_t next_draw_ = 0;
};

void AddFfns(const ModelConfig& config, int layer, const std::string& name, TensorList& tensors) {
  const int64_t hidden = config.hidden;
  if (!config.has_experts(layer)) {
    tensors.Ffn(name, hidden, config.dense_intermediate);
    if (config.sub_norms) tensors.Norm(name + ".ffn_sub_norm", config.dense_intermediate);
    return;
  }
  tensors.Normal(name + ".gate", config.num_experts, hidden,
                 1.0f / std::sqrt(static_cast<float>(hidden)));
  if (config.sub_norms) tensors.Norm(name + ".ffn_sub_norm", config.expert_intermediate);
  for (int expert = 0; expert < config.num_experts; ++expert) {
    tensors.Ffn(absl::StrCat(name, ".experts.", expert), hidden, config.expert_intermediate);
  }
  if (config.shared_intermediate == 0) return;
  tensors.Ffn(name + ".shared_expert", hidden, config.shared_intermediate);
  if (config.sub_norms)
    tensors.Norm(name + ".shared_expert.ffn_sub_norm", config.shared_intermediate);
}

}  // namespace

int64_t RandomTensor::bytes() const {
  int64_t count = DTypeBytes(entry.dtype);
  for (int64_t size : entry.shape) count *= size;
  return count;
}

void RandomTensor::Draw(uint64_t seed, int64_t begin, std::span<uint8_t> out) const {
  if (fill == Fill::kTernary) {
    for (size_t i = 0; i < out.size(); ++i) {
      const uint64_t bits = base::RandomBits(seed, first_draw + begin + i);
      out[i] = kBytes[kernels::TernaryChoice(bits)];
    }
    return;
  }
  if (fill == Fill::kScale) {
    std::memcpy(out.data(), &value, sizeof(float));
    return;
  }
  for (size_t i = 0; i < out.size(); i += 2) {
    const uint64_t draw = first_draw + (begin + i) / 2;
    const float x = fill == Fill::kOnes ? 1.0f : NormalOf(base::RandomBits(seed, draw)) * value;
    const uint16_t bits = ToBf16(x);
    std::memcpy(&out[i], &bits, 2);
  }
}

std::vector<RandomTensor> RandomTensors(const ModelConfig& config) {
  TensorList tensors;
  tensors.Normal("model.embed_tokens", config.vocab_size, config.hidden, 1.0f);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string name = absl::StrCat("model.layers.", layer);
    const std::string attention = name + ".self_attn";
    tensors.Norm(name + ".input_layernorm", config.hidden);
    tensors.Ternary(attention + ".q_proj", config.q_dim(), config.hidden);
    tensors.Ternary(attention + ".k_proj", config.kv_dim(), config.hidden);
    tensors.Ternary(attention + ".v_proj", config.kv_dim(), config.hidden);
    tensors.Ternary(attention + ".o_proj", config.hidden, config.q_dim());
    if (config.sub_norms) tensors.Norm(attention + ".attn_sub_norm", config.q_dim());
    if (config.qk_norms) {
      tensors.Norm(attention + ".q_norm", config.head_dim);
      tensors.Norm(attention + ".k_norm", config.head_dim);
    }
    tensors.Norm(name + ".post_attention_layernorm", config.hidden);
    AddFfns(config, layer, name + ".mlp", tensors);
  }
  tensors.Norm("model.norm", config.hidden);
  if (!config.tied_embeddings) {
    tensors.Normal("lm_head", config.vocab_size, config.hidden,
                   1.0f / std::sqrt(static_cast<float>(config.hidden)));
  }
  return tensors.Take();
}

}  // namespace ternion::runtime
