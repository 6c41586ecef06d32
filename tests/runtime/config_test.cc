#include "runtime/config.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsError;
using test::IsInvalid;
using Json = nlohmann::json;

constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

Json DenseConfig() {
  return Json::parse(R"({
    "model_type": "bitnet", "vocab_size": 131, "hidden_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "intermediate_size": 150,
    "hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": true,
    "bos_token_id": 1, "eos_token_id": [2, 3],
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                            "quantization_mode": "offline"}})");
}

Json MoeConfig() {
  Json json = DenseConfig();
  json.erase("intermediate_size");
  json.erase("hidden_act");
  json.update(Json::parse(R"({
    "model_type": "bitnet_moe", "moe_intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": true, "shared_expert_intermediate_size": 96,
    "act_bits": 8, "kv_bits": 16})"));
  return json;
}

Json QwenConfig() {
  Json json = MoeConfig();
  json["model_type"] = "qwen3_moe";
  json.erase("shared_expert_intermediate_size");
  json.update(Json::parse(R"({
    "intermediate_size": 0, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "attention_bias": false, "rope_scaling": null, "use_sliding_window": false})"));
  return json;
}

absl::StatusOr<ModelConfig> Parse(const Json& json) { return ParseModelConfig(json.dump()); }

// `json` with one value replaced.
absl::Status ErrorWith(Json json, const std::string& key, const Json& value) {
  json[key] = value;
  return Parse(json).status();
}

absl::Status ErrorWithout(Json json, const std::string& key) {
  json.erase(key);
  return Parse(json).status();
}

TEST(Config, Bitnet) {
  const auto config = Parse(DenseConfig());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model_type, "bitnet");
  EXPECT_EQ(config->vocab_size, 131);
  EXPECT_EQ(config->hidden, 72);
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->heads, 6);
  EXPECT_EQ(config->kv_heads, 3);
  EXPECT_EQ(config->head_dim, 12);
  EXPECT_EQ(config->q_dim(), 72);
  EXPECT_EQ(config->kv_dim(), 36);
  EXPECT_EQ(config->max_positions, 512);
  EXPECT_EQ(config->rope_theta, 500000.0f);
  EXPECT_EQ(config->norm_eps, 1e-5f);
  EXPECT_EQ(config->activation, kernels::Activation::kRelu2);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_TRUE(config->sub_norms);
  EXPECT_FALSE(config->qk_norms);
  EXPECT_FALSE(config->moe());
  EXPECT_EQ(config->dense_intermediate, 150);
  EXPECT_EQ(config->max_local_intermediate(), 150);
  EXPECT_EQ(config->local_intermediate(1), 150);
  EXPECT_FALSE(config->has_experts(1));
  EXPECT_EQ(config->num_expert_layers(), 0);
  EXPECT_EQ(config->bos_id, 1);
  EXPECT_EQ(config->eos_ids, std::vector<int32_t>({2, 3}));
}

TEST(Config, BitnetMoe) {
  const auto config = Parse(MoeConfig());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->moe());
  EXPECT_EQ(config->num_experts, 8);
  EXPECT_EQ(config->top_k, 2);
  EXPECT_EQ(config->expert_intermediate, 64);
  EXPECT_EQ(config->shared_intermediate, 96);
  EXPECT_EQ(config->dense_intermediate, 0);
  EXPECT_EQ(config->local_intermediate(0), 96);
  EXPECT_TRUE(config->has_experts(0));
  EXPECT_EQ(config->num_expert_layers(), 2);
  EXPECT_TRUE(config->renormalize);
  EXPECT_TRUE(config->sub_norms);
  EXPECT_FALSE(config->qk_norms);
  EXPECT_EQ(config->activation, kernels::Activation::kSilu);  // hidden_act is not given
}

TEST(Config, FirstLayersMayBeDense) {
  Json json = MoeConfig();
  json["num_hidden_layers"] = 4;
  json["first_k_dense_replace"] = 3;
  EXPECT_TRUE(IsInvalid(Parse(json).status(), "intermediate_size is missing"));
  json["intermediate_size"] = 150;
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->moe());
  EXPECT_EQ(config->num_dense_layers, 3);
  EXPECT_EQ(config->num_expert_layers(), 1);
  EXPECT_FALSE(config->has_experts(2));
  EXPECT_TRUE(config->has_experts(3));
  EXPECT_EQ(config->local_intermediate(2), 150);
  EXPECT_EQ(config->local_intermediate(3), 96);
  EXPECT_EQ(config->max_local_intermediate(), 150);
  for (const int64_t count : {int64_t{4}, int64_t{5}, int64_t{INT32_MAX}}) {
    EXPECT_TRUE(IsInvalid(ErrorWith(json, "first_k_dense_replace", count),
                          "first_k_dense_replace is " + std::to_string(count) +
                              ", which leaves none of 4 layers with experts"));
  }
  for (const Json& value : std::vector<Json>{-1, 1.0, "1", true, int64_t{1} << 40}) {
    EXPECT_TRUE(IsInvalid(ErrorWith(json, "first_k_dense_replace", value),
                          "config.json: first_k_dense_replace"));
  }
  EXPECT_TRUE(IsInvalid(ErrorWith(json, "intermediate_size", 0), "intermediate_size is 0"));
  json["first_k_dense_replace"] = 0;
  EXPECT_EQ(Parse(json)->dense_intermediate, 0);  // no layer has it
  EXPECT_TRUE(IsError(ErrorWith(QwenConfig(), "first_k_dense_replace", 1), kUnimplemented,
                      "first_k_dense_replace"));
}

TEST(Config, Qwen3Moe) {
  const auto config = Parse(QwenConfig());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->moe());
  EXPECT_EQ(config->shared_intermediate, 0);
  EXPECT_EQ(config->dense_intermediate, 0);
  EXPECT_FALSE(config->sub_norms);
  EXPECT_TRUE(config->qk_norms);
  EXPECT_EQ(config->bos_id, -1);  // its tokenizer adds none
}

TEST(Config, DefaultsOfWhatMayBeMissing) {
  Json json = DenseConfig();
  for (const char* key : {"num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
                          "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id"}) {
    json.erase(key);
  }
  const auto config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->kv_heads, 6);
  EXPECT_EQ(config->head_dim, 12);
  EXPECT_EQ(config->activation, kernels::Activation::kRelu2);
  EXPECT_EQ(config->rope_theta, 10000.0f);
  EXPECT_EQ(config->norm_eps, 1e-6f);
  EXPECT_FALSE(config->tied_embeddings);
  EXPECT_EQ(config->bos_id, -1);
  EXPECT_TRUE(config->eos_ids.empty());
}

TEST(Config, ASeedStandsForWeights) {
  Json json = DenseConfig();
  json["quantization_config"]["linear_class"] = "autobitlinear";
  json["quantization_config"]["quantization_mode"] = "offline";
  EXPECT_EQ(Parse(json)->random_seed, std::nullopt);
  json["random_weights_seed"] = 7;
  ASSERT_TRUE(Parse(json).ok()) << Parse(json).status();
  EXPECT_EQ(Parse(json)->random_seed, 7);
  json["random_weights_seed"] = -1;
  EXPECT_FALSE(Parse(json).ok());
  json["random_weights_seed"] = 7;
  json["quantization_config"]["quantization_mode"] = "online";
  EXPECT_FALSE(Parse(json).ok());
}

TEST(Config, LinearClassAndModeSayWhatLiesOnDisk) {
  struct Case {
    const char* linear_class;  // null: not given
    const char* mode;
    bool online, scale_divides;
  };
  const Case cases[] = {{"autobitlinear", "offline", false, false},
                        {"autobitlinear", "online", true, false},
                        {"autobitlinear", nullptr, false, false},
                        {"bitlinear", "offline", false, true},
                        {"bitlinear", "online", false, true},  // BitLinear always holds codes
                        {nullptr, nullptr, false, true}};
  for (const Case& c : cases) {
    Json json = DenseConfig();
    json["quantization_config"] = {{"quant_method", "bitnet"}};
    if (c.linear_class) json["quantization_config"]["linear_class"] = c.linear_class;
    if (c.mode) json["quantization_config"]["quantization_mode"] = c.mode;
    const auto config = Parse(json);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->quantization.online, c.online) << json;
    EXPECT_EQ(config->quantization.scale_divides, c.scale_divides) << json;
  }
}

TEST(Config, QuantizationThatIsNotOurs) {
  EXPECT_TRUE(IsInvalid(ErrorWithout(DenseConfig(), "quantization_config"),
                        "quantization_config is missing"));
  EXPECT_TRUE(IsInvalid(ErrorWith(DenseConfig(), "quantization_config", "bitnet"),
                        "quantization_config is missing"));
  const auto error_with = [](const char* key, const Json& value) {
    Json json = DenseConfig();
    json["quantization_config"][key] = value;
    return Parse(json).status();
  };
  EXPECT_TRUE(IsInvalid(error_with("quant_method", "gptq"), "quant_method is \"gptq\""));
  EXPECT_TRUE(IsInvalid(error_with("quant_method", nullptr), "quant_method is \"\""));
  EXPECT_TRUE(IsInvalid(error_with("linear_class", "linear"), "linear_class is \"linear\""));
  EXPECT_TRUE(IsInvalid(error_with("linear_class", 1), "linear_class is not a string"));
  EXPECT_TRUE(
      IsInvalid(error_with("quantization_mode", "later"), "quantization_mode is \"later\""));
  EXPECT_TRUE(IsError(error_with("use_rms_norm", true), kUnimplemented, "use_rms_norm"));
}

TEST(Config, UnknownFamily) {
  EXPECT_TRUE(
      IsError(ErrorWith(DenseConfig(), "model_type", "llama"), kUnimplemented, "\"llama\""));
  EXPECT_TRUE(IsError(ErrorWithout(DenseConfig(), "model_type"), kUnimplemented, "model_type"));
  EXPECT_FALSE(ErrorWith(DenseConfig(), "model_type", 7).ok());
}

TEST(Config, WhatTheRuntimeDoesNotDoIsRefused) {
  struct Case {
    const char* key;
    Json value;
  };
  const Case cases[] = {{"rope_scaling", {{"type", "yarn"}, {"factor", 4.0}}},
                        {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}},
                        {"attention_bias", true},
                        {"use_sliding_window", true},
                        {"mlp_only_layers", {0}},
                        {"decoder_sparse_step", 2},
                        {"hidden_act", "gelu"}};
  for (const Case& c : cases) {
    EXPECT_TRUE(IsError(ErrorWith(MoeConfig(), c.key, c.value), kUnimplemented, c.key)) << c.value;
  }
}

TEST(Config, PrecisionsOfActivationsAndCache) {
  for (const int act_bits : {8, 4}) {
    for (const int kv_bits : {16, 8, 4, 3}) {
      Json json = MoeConfig();
      json["act_bits"] = act_bits;
      json["kv_bits"] = kv_bits;
      const auto config = Parse(json);
      ASSERT_TRUE(config.ok()) << config.status();
      EXPECT_EQ(config->act_bits, act_bits);
      EXPECT_EQ(config->kv_bits, kv_bits);
    }
  }
  const auto plain = Parse(DenseConfig());  // neither is given
  EXPECT_EQ(plain->act_bits, 8);
  EXPECT_EQ(plain->kv_bits, 16);
  for (const int bits : {1, 2, 3, 5, 7, 16, 32}) {
    EXPECT_TRUE(IsError(ErrorWith(MoeConfig(), "act_bits", bits), kUnimplemented, "act_bits"));
  }
  for (const int bits : {1, 2, 5, 7, 32}) {
    EXPECT_TRUE(IsError(ErrorWith(MoeConfig(), "kv_bits", bits), kUnimplemented, "kv_bits"));
  }
  for (const Json& json : {DenseConfig(), QwenConfig()}) {
    EXPECT_TRUE(IsError(ErrorWith(json, "act_bits", 4), kUnimplemented, "act_bits 4"));
  }
  for (const char* key : {"act_bits", "kv_bits"}) {
    for (const Json& value : std::vector<Json>{0, -4, 33, 4.0, "4", true}) {
      EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), key, value), key)) << value;
    }
  }
}

TEST(Config, EveryNumberIsNeededAndChecked) {
  const std::vector<Json> bad = {-1,
                                 0,
                                 int64_t{-1} << 62,
                                 (int64_t{1} << 42) + 1,
                                 uint64_t{0xffffffffffffffff},
                                 1e300,
                                 1.5,
                                 64.0,
                                 "64",
                                 true,
                                 Json::array({64}),
                                 Json::object()};
  const std::vector<std::string> keys = {"vocab_size",
                                         "hidden_size",
                                         "num_hidden_layers",
                                         "num_attention_heads",
                                         "num_key_value_heads",
                                         "head_dim",
                                         "max_position_embeddings",
                                         "moe_intermediate_size",
                                         "num_experts",
                                         "num_experts_per_tok"};
  for (const std::string& key : keys) {
    for (const Json& value : bad) {
      EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), key, value), "config.json: " + key))
          << key << ": " << value;
    }
    if (key == "num_key_value_heads" || key == "head_dim") continue;
    EXPECT_TRUE(IsInvalid(ErrorWithout(MoeConfig(), key), key + " is missing"));
    EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), key, nullptr), key + " is missing"));
  }
  EXPECT_TRUE(IsInvalid(ErrorWithout(DenseConfig(), "intermediate_size"), "intermediate_size"));
  EXPECT_TRUE(IsInvalid(ErrorWith(DenseConfig(), "intermediate_size", 0), "intermediate_size"));
  EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), "shared_expert_intermediate_size", -4),
                        "shared_expert_intermediate_size"));
}

TEST(Config, RealNumbers) {
  for (const char* key : {"rope_theta", "rms_norm_eps"}) {
    for (const Json& value : std::vector<Json>{0, -1.0, 1e300, "1e-5", true, Json::array()}) {
      EXPECT_TRUE(IsInvalid(ErrorWith(DenseConfig(), key, value), key)) << value;
    }
  }
  EXPECT_TRUE(Parse(DenseConfig()).ok());
}

TEST(Config, NotJson) {
  // JSON has no NaN and no infinity, and 1e400 is none of its numbers either.
  for (const std::string text :
       {"", "{", "[]", "null", "{\"model_type\": NaN}", "{\"rope_theta\": 1e400}",
        "{\"rope_theta\": Infinity}", "{\"model_type\": \"\xff\"}"}) {
    EXPECT_TRUE(IsInvalid(ParseModelConfig(text).status(), "config.json")) << text;
  }
  // Of two values for one key, neither can be trusted.
  std::string text = DenseConfig().dump();
  text.insert(1, "\"hidden_size\": 64,");
  EXPECT_TRUE(IsInvalid(ParseModelConfig(text).status(), "duplicate key \"hidden_size\""));
}

TEST(Config, WrongTypes) {
  EXPECT_TRUE(IsInvalid(ErrorWith(DenseConfig(), "tie_word_embeddings", 1), "tie_word_embeddings"));
  EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), "norm_topk_prob", "yes"), "norm_topk_prob"));
  EXPECT_FALSE(ErrorWith(DenseConfig(), "hidden_act", 3).ok());
  for (const Json& id : std::vector<Json>{-1, 1.0, "2", (int64_t{1} << 42) + 1, true,
                                          uint64_t{0xffffffffffffffff}, Json::array({2, -2})}) {
    EXPECT_TRUE(IsInvalid(ErrorWith(DenseConfig(), "eos_token_id", id), "eos_token_id")) << id;
    EXPECT_TRUE(IsInvalid(ErrorWith(DenseConfig(), "bos_token_id", id), "bos_token_id")) << id;
  }
}

TEST(Config, NumbersThatDoNotFitTogether) {
  EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), "num_experts_per_tok", 9),
                        "num_experts_per_tok is 9, more than num_experts 8"));
  EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), "num_key_value_heads", 4),
                        "num_key_value_heads is 4, which does not divide"));
  EXPECT_TRUE(IsInvalid(ErrorWith(MoeConfig(), "head_dim", 13), "head_dim is odd"));
  Json json = DenseConfig();
  json.erase("head_dim");
  json["hidden_size"] = 74;
  EXPECT_TRUE(IsInvalid(Parse(json).status(), "does not divide hidden_size"));
  json["hidden_size"] = 78;  // 13 a head
  EXPECT_TRUE(IsInvalid(Parse(json).status(), "head_dim"));
  // Without head_dim, what follows from the others is held to the same limits.
  json["hidden_size"] = 6 * 2048;
  EXPECT_TRUE(IsInvalid(Parse(json).status(), "head_dim"));
  json["hidden_size"] = 6;
  EXPECT_TRUE(IsInvalid(Parse(json).status(), "head_dim"));
  json = DenseConfig();
  json["num_attention_heads"] = 4095;
  json["head_dim"] = 1024;
  EXPECT_TRUE(IsInvalid(Parse(json).status(), "num_attention_heads"));
}

TEST(Config, GenerationConfigAddsEndIds) {
  test::TempDir directory;
  directory.Write("config.json", DenseConfig().dump());
  EXPECT_EQ(LoadModelConfig(directory.path())->eos_ids, std::vector<int32_t>({2, 3}));
  directory.Write("generation_config.json", R"({"eos_token_id": [3, 9]})");
  EXPECT_EQ(LoadModelConfig(directory.path())->eos_ids, std::vector<int32_t>({2, 3, 9}));
  directory.Write("generation_config.json", "[]");
  EXPECT_TRUE(IsInvalid(LoadModelConfig(directory.path()).status(), "generation_config.json"));
  directory.Write("generation_config.json", R"({"eos_token_id": "</s>"})");
  EXPECT_TRUE(IsInvalid(LoadModelConfig(directory.path()).status(),
                        "generation_config.json: eos_token_id"));
}

TEST(Config, NoFile) {
  test::TempDir directory;
  EXPECT_TRUE(IsError(LoadModelConfig(directory.path()).status(), absl::StatusCode::kNotFound,
                      "config.json"));
}

}  // namespace
}  // namespace ternion::runtime
