// `ternion synth` and `ternion inspect`.
#include <string>

#include "gtest/gtest.h"
#include "launcher/shapes.h"
#include "runtime/config.h"
#include "runtime/random_weights.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

namespace fs = std::filesystem;

// Sizes that divide nothing.
Json SmallConfig(const std::string& model_type) {
  Json config = {{"model_type", model_type},
                 {"vocab_size", 301},
                 {"hidden_size", 84},
                 {"num_hidden_layers", 2},
                 {"num_attention_heads", 6},
                 {"num_key_value_heads", 3},
                 {"head_dim", 14},
                 {"max_position_embeddings", 128},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000.0},
                 {"tie_word_embeddings", model_type != "qwen3_moe"}};
  if (model_type == "bitnet") {
    config["hidden_act"] = "relu2";
    config["intermediate_size"] = 130;
    return config;
  }
  config["hidden_act"] = "silu";
  config["num_experts"] = 7;
  config["num_experts_per_tok"] = 3;
  config["moe_intermediate_size"] = 46;
  config["norm_topk_prob"] = true;
  if (model_type == "bitnet_moe") {
    config["shared_expert_intermediate_size"] = 50;
    config["first_k_dense_replace"] = 1;
    config["intermediate_size"] = 130;
  }
  return config;
}

class Synth : public testing::TestWithParam<const char*> {
 protected:
  Synth() { WriteText(config_, SmallConfig(GetParam()).dump()); }

  CommandResult Make(const std::string& out, const std::string& seed) const {
    return RunTernion(0, {"synth", "--config", config_, "--seed", seed, "--out", out});
  }

  const TempDir directory_;
  const std::string config_ = directory_.path("small.json");
};

TEST_P(Synth, WritesAModelThatRuns) {
  const std::string model = directory_.path("model");
  ASSERT_EQ(Make(model, "3").exit_code, 0);

  const CommandResult inspected = RunTernion(0, {"inspect", "--model", model});
  EXPECT_EQ(inspected.exit_code, 0) << inspected.err;
  EXPECT_TRUE(inspected.out.starts_with(GetParam())) << inspected.out;
  EXPECT_NE(inspected.out.find("model.layers.1.self_attn.o_proj.weight_scale"), std::string::npos);
  const bool dense_first = std::string(GetParam()) == "bitnet_moe";
  EXPECT_EQ(inspected.out.find("expert of 50; dense layers first: 1, intermediate 130\n") !=
                std::string::npos,
            dense_first)
      << inspected.out;
  EXPECT_EQ(inspected.out.find("model.layers.0.mlp.experts.") == std::string::npos,
            dense_first || std::string(GetParam()) == "bitnet");

  const std::string ids = directory_.path("ids.json"), logits = directory_.path("x.npy");
  WriteText(ids, "[1, 300, 5, 77]");
  const CommandResult evaluated =
      RunTernion(2, {"eval", "--model", model, "--ids-file", ids, "--logits-out", logits});
  EXPECT_EQ(evaluated.exit_code, 0) << evaluated.err;
  EXPECT_EQ(fs::file_size(logits), 128 + 4 * 301 * sizeof(float));

  std::string hash;
  for (int ranks : {0, 2}) {
    const std::string json = directory_.path("j.json");
    const CommandResult run =
        RunTernion(ranks, {"run", "--model", model, "--prompt", "any bytes \xff", "--max-tokens",
                           "5", "--wire", "exact", "--json", json});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    const std::string now = ReadJson(json)["logits_hash"];
    EXPECT_TRUE(hash.empty() || hash == now) << hash << " " << now;
    hash = now;
  }
}

TEST_P(Synth, SeedsDecideTheBytes) {
  for (const auto& [name, seed] : {std::pair("a", "3"), {"b", "3"}, {"c", "4"}}) {
    ASSERT_EQ(Make(directory_.path(name), seed).exit_code, 0);
  }
  for (const auto& entry : fs::directory_iterator(directory_.path("a"))) {
    const std::string name = entry.path().filename();
    const std::string bytes = ReadText(entry.path());
    EXPECT_EQ(bytes, ReadText(directory_.path("b/" + name))) << name;
    EXPECT_EQ(bytes == ReadText(directory_.path("c/" + name)), !name.ends_with(".safetensors"))
        << name;
  }
}

TEST_P(Synth, WeightsMayBeDrawnWhenLoaded) {
  const std::string files = directory_.path("files"), seed = directory_.path("seed");
  ASSERT_EQ(Make(files, "9007199254740992").exit_code, 0);
  ASSERT_EQ(RunTernion(0, {"synth", "--config", config_, "--seed", "9007199254740992", "--out",
                           seed, "--seed-only"})
                .exit_code,
            0);
  EXPECT_FALSE(fs::exists(seed + "/model.safetensors"));
  std::vector<std::string> hashes;
  for (const std::string& model : {files, seed}) {
    const std::string json = directory_.path("j.json");
    const CommandResult run = RunTernion(
        2, {"run", "--model", model, "--prompt", "any", "--max-tokens", "3", "--json", json});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    hashes.push_back(ReadJson(json)["logits_hash"]);
  }
  EXPECT_EQ(hashes[0], hashes[1]);
  EXPECT_EQ(RunTernion(0, {"inspect", "--model", files}).out,
            RunTernion(0, {"inspect", "--model", seed}).out);
}

TEST_P(Synth, LeavesWhatExists) {
  const std::string model = directory_.path("model");
  fs::create_directory(model);
  WriteText(model + "/precious", "x");
  const CommandResult result = Make(model, "3");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_EQ(LinesThatStartWith(result.err, "ternion: error:").size(), 1u) << result.err;
  EXPECT_EQ(ReadText(model + "/precious"), "x");
  EXPECT_EQ(std::distance(fs::directory_iterator(model), fs::directory_iterator()), 1);
}

INSTANTIATE_TEST_SUITE_P(Families, Synth, testing::Values("bitnet", "bitnet_moe", "qwen3_moe"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Shapes, AreConfigs) {
  for (const std::string& name : ShapeNames()) {
    absl::StatusOr<Json> config = ShapeConfig(name);
    ASSERT_TRUE(config.ok()) << config.status();
    (*config)["quantization_config"] = {{"quant_method", "bitnet"},
                                        {"linear_class", "autobitlinear"},
                                        {"quantization_mode", "offline"}};
    const auto parsed = runtime::ParseModelConfig(config->dump());
    EXPECT_TRUE(parsed.ok()) << name << ": " << parsed.status();
  }
  EXPECT_FALSE(ShapeConfig("bitnet").ok());
}

// 671 billion parameters, and what its attention has more than MLA.
TEST(Shapes, DeepSeekV3IsAsLargeAsTheModel) {
  Json json = *ShapeConfig("deepseek-v3");
  json["quantization_config"] = {{"quant_method", "bitnet"}, {"linear_class", "autobitlinear"}};
  int64_t parameters = 0;
  for (const runtime::RandomTensor& tensor :
       runtime::RandomTensors(*runtime::ParseModelConfig(json.dump()))) {
    if (tensor.fill == runtime::RandomTensor::Fill::kTernary) parameters += 4 * tensor.bytes();
    if (tensor.fill == runtime::RandomTensor::Fill::kNormal) parameters += tensor.bytes() / 2;
  }
  EXPECT_NEAR(static_cast<double>(parameters), 675e9, 0.5e9);
}

}  // namespace
}  // namespace ternion::launcher
