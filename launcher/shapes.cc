#include "launcher/shapes.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace ternion::launcher {
namespace {

using Json = nlohmann::ordered_json;

Json Common(int vocab, int hidden, int layers, int heads, int kv_heads) {
  return {{"vocab_size", vocab},
          {"hidden_size", hidden},
          {"num_hidden_layers", layers},
          {"num_attention_heads", heads},
          {"num_key_value_heads", kv_heads},
          {"head_dim", 128},
          {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 500000.0},
          {"tie_word_embeddings", false}};
}

Json Moe(Json config, const char* model_type, int experts, int top_k, int intermediate) {
  config["model_type"] = model_type;
  config["hidden_act"] = "silu";
  config["num_experts"] = experts;
  config["num_experts_per_tok"] = top_k;
  config["moe_intermediate_size"] = intermediate;
  config["norm_topk_prob"] = true;
  return config;
}

Json BitNet2b() {
  Json config = Common(128256, 2560, 30, 20, 5);
  config["model_type"] = "bitnet";
  config["hidden_act"] = "relu2";
  config["intermediate_size"] = 6912;
  config["tie_word_embeddings"] = true;
  return config;
}

Json DeepSeekV3() {
  Json config = Moe(Common(129280, 7168, 61, 128, 8), "bitnet_moe", 256, 8, 2048);
  config["shared_expert_intermediate_size"] = 2048;
  config["first_k_dense_replace"] = 3;
  config["intermediate_size"] = 18432;
  return config;
}

struct Shape {
  const char* name;
  Json (*config)();
};

const Shape kShapes[] = {
    {"bitnet-2b", BitNet2b},
    {"mixtral-8x7b", [] { return Moe(Common(32000, 4096, 32, 32, 8), "bitnet_moe", 8, 2, 14336); }},
    {"qwen3-30b-a3b",
     [] { return Moe(Common(151936, 2048, 48, 32, 4), "qwen3_moe", 128, 8, 768); }},
    {"deepseek-v3", DeepSeekV3},
};

}  // namespace

std::vector<std::string> ShapeNames() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.push_back(shape.name);
  return names;
}

absl::StatusOr<Json> ShapeConfig(const std::string& name) {
  for (const Shape& shape : kShapes) {
    if (name == shape.name) return shape.config();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no shape \"", name, "\"; there are ", absl::StrJoin(ShapeNames(), ", ")));
}

}  // namespace ternion::launcher
