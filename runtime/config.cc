#include "runtime/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "base/file.h"
#include "base/status.h"
#include "kernels/sampling.h"
#include "runtime/strict_json.h"

namespace ternion::runtime {
namespace {

using Json = nlohmann::json;

// Larger than any model; small enough that products of a few stay far below 2^63.
constexpr int64_t kMaxDimension = int64_t{1} << 20;

absl::StatusOr<Json> ParseObject(const std::string& text, const char* file) {
  absl::StatusOr<Json> json = ParseJson(text);
  if (!json.ok()) return base::Annotate(json.status(), file);
  if (!json->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, " is not a JSON object"));
  }
  return json;
}

// Reads checked values out of one JSON object; the first error is kept.
class Reader {
 public:
  explicit Reader(const Json& json, const char* file = "config.json") : json_(json), file_(file) {}

  bool Has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }

  int64_t Int(const char* key, int64_t low, int64_t high) {
    if (!Has(key)) return Fail(key, "is missing"), low;
    const Json& value = json_[key];
    if (!value.is_number_integer()) return Fail(key, "is not an integer"), low;
    // An unsigned value past int64 reads as negative here, and is out of range either way.
    const int64_t number = value.get<int64_t>();
    if (number < low || number > high) {
      Fail(key, absl::StrCat("is ", value.dump(), "; it must be ", low, " to ", high));
      return low;
    }
    return number;
  }
  int64_t IntOr(const char* key, int64_t low, int64_t high, int64_t fallback) {
    return Has(key) ? Int(key, low, high) : fallback;
  }

  float Positive(const char* key, double high, float fallback) {
    if (!Has(key)) return fallback;
    const Json& value = json_[key];
    const double number = value.is_number() ? value.get<double>() : NAN;
    if (!(number > 0 && number <= high)) {
      return Fail(key,
                  absl::StrCat("is ", value.dump(), "; it must be above 0 and at most ", high)),
             fallback;
    }
    return static_cast<float>(number);
  }

  bool Bool(const char* key, bool fallback) {
    if (!Has(key)) return fallback;
    if (!json_[key].is_boolean()) return Fail(key, "is not true or false"), fallback;
    return json_[key].get<bool>();
  }

  std::string String(const char* key, const std::string& fallback) {
    if (!Has(key)) return fallback;
    if (!json_[key].is_string()) return Fail(key, "is not a string"), fallback;
    return json_[key].get<std::string>();
  }

  // Unimplemented when `key` holds anything but null, false, 0 or an empty list.
  void Refuse(const char* key) {
    if (!Has(key)) return;
    const Json& value = json_[key];
    if (value == false || value == 0 || (value.is_array() && value.empty())) return;
    Note(absl::UnimplementedError(absl::StrCat(file_, ": ", key, " is not supported")));
  }

  void Fail(const char* key, absl::string_view why) {
    Note(absl::InvalidArgumentError(absl::StrCat(file_, ": ", key, " ", why)));
  }
  void Note(const absl::Status& status) { status_.Update(status); }
  const absl::Status& status() const { return status_; }
  const Json& json() const { return json_; }

 private:
  const Json& json_;
  const char* const file_;
  absl::Status status_;
};

kernels::Activation ReadActivation(Reader& reader, const char* fallback) {
  const std::string name = reader.String("hidden_act", fallback);
  if (name == "silu") return kernels::Activation::kSilu;
  if (name == "relu2") return kernels::Activation::kRelu2;
  reader.Note(absl::UnimplementedError(
      absl::StrCat("config.json: hidden_act ", name, " is not supported (silu, relu2 are)")));
  return kernels::Activation::kSilu;
}

QuantizationConfig ReadQuantization(Reader& reader) {
  QuantizationConfig config;
  if (!reader.Has("quantization_config") || !reader.json()["quantization_config"].is_object()) {
    reader.Fail("quantization_config", "is missing: this is not a ternary checkpoint");
    return config;
  }
  Reader inner(reader.json()["quantization_config"]);
  const std::string method = inner.String("quant_method", "");
  if (method != "bitnet") {
    inner.Fail("quant_method", absl::StrCat("is \"", method, "\"; only \"bitnet\" is ternary"));
  }
  const std::string linear_class = inner.String("linear_class", "bitlinear");
  const std::string mode = inner.String("quantization_mode", "offline");
  if (linear_class != "bitlinear" && linear_class != "autobitlinear") {
    inner.Fail("linear_class", absl::StrCat("is \"", linear_class,
                                            "\"; it must be bitlinear or autobitlinear, since the "
                                            "meaning of weight_scale depends on it"));
  }
  if (mode != "online" && mode != "offline") {
    inner.Fail("quantization_mode",
               absl::StrCat("is \"", mode, "\"; it must be online or offline"));
  }
  // Its norm differs between the experts of a layer, so one row could not serve them all.
  inner.Refuse("use_rms_norm");
  reader.Note(inner.status());
  config.scale_divides = linear_class == "bitlinear";
  // HF's BitLinear always holds packed codes, whatever the mode says.
  config.online = mode == "online" && linear_class == "autobitlinear";
  return config;
}

void ReadTokenIds(const Json& json, const char* key, Reader& reader, std::vector<int32_t>& ids) {
  if (!json.contains(key) || json[key].is_null()) return;
  const Json list = json[key].is_array() ? json[key] : Json::array({json[key]});
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 ||
        id.get<int64_t>() >= kernels::kMaxVocab) {
      return reader.Fail(key, absl::StrCat("holds ", id.dump(), ", which is not a token id"));
    }
    const int32_t value = id.get<int32_t>();
    if (std::find(ids.begin(), ids.end(), value) == ids.end()) ids.push_back(value);
  }
}

void ReadExperts(Reader& reader, ModelConfig& config) {
  config.num_experts = static_cast<int>(reader.Int("num_experts", 1, 65535));
  config.top_k = static_cast<int>(reader.Int("num_experts_per_tok", 1, 64));
  config.expert_intermediate = reader.Int("moe_intermediate_size", 1, kernels::kMaxColumns);
  config.shared_intermediate =
      reader.IntOr("shared_expert_intermediate_size", 0, kernels::kMaxColumns, 0);
  config.renormalize = reader.Bool("norm_topk_prob", false);
  if (config.top_k > config.num_experts) {
    reader.Fail("num_experts_per_tok",
                absl::StrCat("is ", config.top_k, ", more than num_experts ", config.num_experts));
  }
  if (reader.IntOr("decoder_sparse_step", 1, 65535, 1) != 1) {
    reader.Note(absl::UnimplementedError("config.json: decoder_sparse_step other than 1"));
  }
  reader.Refuse("mlp_only_layers");
}

// Layers before those with experts.
void ReadDenseLayers(Reader& reader, ModelConfig& config) {
  const int64_t count = reader.IntOr("first_k_dense_replace", 0, INT32_MAX, 0);
  if (count == 0) return;
  if (count >= config.num_layers) {
    return reader.Fail("first_k_dense_replace",
                       absl::StrCat("is ", count, ", which leaves none of ", config.num_layers,
                                    " layers with experts; a model without any is a \"bitnet\""));
  }
  config.num_dense_layers = static_cast<int>(count);
  config.dense_intermediate = reader.Int("intermediate_size", 1, kernels::kMaxColumns);
}

void ReadAttention(Reader& reader, ModelConfig& config) {
  config.heads = static_cast<int>(reader.Int("num_attention_heads", 1, 4096));
  config.kv_heads = static_cast<int>(reader.IntOr("num_key_value_heads", 1, 4096, config.heads));
  if (config.heads % config.kv_heads != 0) {
    reader.Fail("num_key_value_heads",
                absl::StrCat("is ", config.kv_heads, ", which does not divide ", config.heads,
                             " attention heads"));
  }
  if (!reader.Has("head_dim") && config.hidden % config.heads != 0) {
    reader.Fail("num_attention_heads", "does not divide hidden_size and there is no head_dim");
  }
  constexpr int64_t kMaxHeadDim = 1024;
  const int64_t derived = config.hidden / config.heads;
  if (!reader.Has("head_dim") && (derived < 2 || derived > kMaxHeadDim)) {
    reader.Fail("head_dim", absl::StrCat("is missing, and hidden_size / num_attention_heads is ",
                                         derived, "; it must be 2 to ", kMaxHeadDim));
  }
  config.head_dim = static_cast<int>(
      reader.IntOr("head_dim", 2, kMaxHeadDim, std::clamp<int64_t>(derived, 2, kMaxHeadDim)));
  if (config.head_dim % 2 != 0) reader.Fail("head_dim", "is odd; RoPE rotates pairs");
  if (config.q_dim() > kernels::kMaxColumns) {
    reader.Fail("num_attention_heads", "times head_dim is too large");
  }
  reader.Refuse("rope_scaling");
  reader.Refuse("rope_parameters");  // transformers 5; its theta would go unread
  reader.Refuse("attention_bias");
  reader.Refuse("use_sliding_window");
}

void ReadPrecisions(Reader& reader, bool is_bitnet_moe, ModelConfig& config) {
  config.act_bits = static_cast<int>(reader.IntOr("act_bits", 1, 32, 8));
  config.kv_bits = static_cast<int>(reader.IntOr("kv_bits", 1, 32, 16));
  if (config.act_bits != 8 && (config.act_bits != 4 || !is_bitnet_moe)) {
    reader.Note(absl::UnimplementedError(
        absl::StrCat("config.json: act_bits ", config.act_bits,
                     " is not supported (8 is, and 4 for model_type bitnet_moe)")));
  }
  if (!kernels::KvFormatOfBits(config.kv_bits)) {
    reader.Note(absl::UnimplementedError(absl::StrCat("config.json: kv_bits ", config.kv_bits,
                                                      " is not supported (16, 8, 4 and 3 are)")));
  }
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& json_text) {
  TERNION_ASSIGN_OR_RETURN(const Json json, ParseObject(json_text, "config.json"));
  Reader reader(json);
  ModelConfig config;
  config.model_type = reader.String("model_type", "");
  const bool ours = config.model_type == "bitnet_moe";
  const bool qwen = config.model_type == "qwen3_moe";
  if (!ours && !qwen && config.model_type != "bitnet") {
    return absl::UnimplementedError(
        absl::StrCat("config.json: model_type \"", config.model_type,
                     "\" is not supported (bitnet, bitnet_moe, qwen3_moe are)"));
  }
  config.vocab_size = reader.Int("vocab_size", 1, kernels::kMaxVocab);
  config.hidden = reader.Int("hidden_size", 1, kernels::kMaxColumns);
  config.num_layers = static_cast<int>(reader.Int("num_hidden_layers", 1, 4096));
  ReadAttention(reader, config);
  config.max_positions = reader.Int("max_position_embeddings", 1, kMaxDimension * 16);
  config.rope_theta = reader.Positive("rope_theta", 1e12, 10000);
  config.norm_eps = reader.Positive("rms_norm_eps", 1, 1e-6f);
  config.activation = ReadActivation(reader, qwen || ours ? "silu" : "relu2");
  config.tied_embeddings = reader.Bool("tie_word_embeddings", false);
  config.sub_norms = !qwen;
  config.qk_norms = qwen;
  if (ours || qwen) {
    ReadExperts(reader, config);
    if (ours) ReadDenseLayers(reader, config);
    if (qwen) reader.Refuse("first_k_dense_replace");
  } else {
    config.num_dense_layers = config.num_layers;
    config.dense_intermediate = reader.Int("intermediate_size", 1, kernels::kMaxColumns);
  }
  ReadPrecisions(reader, ours, config);
  config.quantization = ReadQuantization(reader);
  if (reader.Has("random_weights_seed")) {
    config.random_seed = reader.Int("random_weights_seed", 0, int64_t{1} << 53);
    if (config.quantization.online || config.quantization.scale_divides) {
      reader.Fail("random_weights_seed",
                  "needs offline quantization of linear_class autobitlinear");
    }
  }
  std::vector<int32_t> bos;
  ReadTokenIds(json, "bos_token_id", reader, bos);
  // Qwen's config names one, but its tokenizer never adds it.
  if (!bos.empty() && !qwen) config.bos_id = bos[0];
  ReadTokenIds(json, "eos_token_id", reader, config.eos_ids);
  TERNION_RETURN_IF_ERROR(reader.status());
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(directory + "/config.json"));
  TERNION_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(text));
  const std::string generation_path = directory + "/generation_config.json";
  if (std::filesystem::exists(generation_path)) {
    TERNION_ASSIGN_OR_RETURN(const std::string generation, base::ReadFile(generation_path));
    TERNION_ASSIGN_OR_RETURN(const Json json, ParseObject(generation, "generation_config.json"));
    Reader reader(json, "generation_config.json");
    ReadTokenIds(json, "eos_token_id", reader, config.eos_ids);
    TERNION_RETURN_IF_ERROR(reader.status());
  }
  if (config.bos_id >= config.vocab_size) config.bos_id = -1;
  return config;
}

}  // namespace ternion::runtime
