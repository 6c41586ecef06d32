// `ternion bench decode` as a user runs it, small: what it counts and what it refuses. Nothing that
// is timed is compared.
#include <algorithm>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

// Sizes that no layout pads.
constexpr int kLayers = 2, kHidden = 128, kKvDim = 64, kVocab = 512;
constexpr int kExperts = 8, kTopK = 2, kIntermediate = 64;
constexpr int kKvTokenBytes = kLayers * 2 * kKvDim * 2;  // at bf16

const Json kConfig = {{"model_type", "qwen3_moe"},
                      {"vocab_size", kVocab},
                      {"hidden_size", kHidden},
                      {"num_hidden_layers", kLayers},
                      {"num_attention_heads", 4},
                      {"num_key_value_heads", 2},
                      {"head_dim", 32},
                      {"max_position_embeddings", 128},
                      {"rms_norm_eps", 1e-5},
                      {"rope_theta", 10000.0},
                      {"tie_word_embeddings", false},
                      {"hidden_act", "silu"},
                      {"num_experts", kExperts},
                      {"num_experts_per_tok", kTopK},
                      {"moe_intermediate_size", kIntermediate},
                      {"norm_topk_prob", true}};

class BenchDecode : public testing::Test {
 protected:
  BenchDecode() {
    WriteText(directory_.path("config.json"), kConfig.dump());
    const CommandResult made = RunTernion(
        0, {"synth", "--config", directory_.path("config.json"), "--seed-only", "--out", model_});
    EXPECT_EQ(made.exit_code, 0) << made.err;
  }

  // A small run; `more` may name its flags again.
  Strings Arguments(const std::string& model, const Strings& more) const {
    Strings arguments = {"bench", "decode"};
    const std::pair<const char*, std::string> usual[] = {
        {"--model", model}, {"--json", json_}, {"--prompt-tokens", "3"}, {"--tokens", "4"}};
    for (const auto& [flag, value] : usual) {
      if (std::count(more.begin(), more.end(), flag) > 0) continue;
      arguments.insert(arguments.end(), {flag, value});
    }
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  Json Report(int ranks, const std::string& model, const Strings& more) const {
    const CommandResult result = RunTernion(ranks, Arguments(model, more));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    if (result.exit_code == 0) return ReadJson(json_);
    return {{"batches", Json::array()}, {"memory", Json::array()}};
  }

  void ExpectError(const Strings& more, const std::string& text) const {
    for (int ranks : {0, 2}) {
      SCOPED_TRACE(text + ", ranks: " + std::to_string(ranks));
      const CommandResult result = RunTernion(ranks, Arguments(model_, more));
      EXPECT_NE(result.exit_code, 0);
      EXPECT_FALSE(result.timed_out);
      const Strings lines = LinesThatStartWith(result.err, "ternion: error: ");
      ASSERT_EQ(lines.size(), 1u) << result.err;
      EXPECT_NE(lines[0].find(text), std::string::npos) << lines[0];
      EXPECT_EQ(result.out, "");
      EXPECT_FALSE(std::filesystem::exists(json_));
    }
  }

  const TempDir directory_;
  const std::string model_ = directory_.path("model");
  const std::string json_ = directory_.path("report.json");
};

double BytesOf(const Json& memory, const std::string& kind) {
  return memory["weights"].contains(kind) ? memory["weights"][kind]["bytes"].get<double>() : 0;
}

// What a rank reads of any step: all but experts. A tied head is the embedding.
double BytesOfEveryStep(const Json& memory) {
  const bool tied = !memory["weights"].contains("head");
  return BytesOf(memory, "attention") + BytesOf(memory, "gates") +
         BytesOf(memory, tied ? "embedding" : "head");
}

void ExpectABoundOfItsReads(const Json& batch) {
  double bytes = 0, speed = 0;  // of one node
  for (const Json& rank : batch["per_rank"]) {
    bytes += rank["weight_bytes"].get<double>() + rank["kv_bytes"].get<double>();
    speed += rank["gb_per_s"].get<double>() * 1e9;
  }
  ASSERT_GT(speed, 0);
  const double bound = batch["batch"].get<double>() * speed / bytes;
  EXPECT_NEAR(batch["bound_tok_s"].get<double>() / bound, 1, 1e-9);
  const double rate = batch["tok_s"];
  EXPECT_GT(rate, 0);
  EXPECT_NEAR(rate, batch["batch"].get<double>() / batch["step_ms"]["p50"].get<double>() * 1e3,
              rate * 1e-9);
  EXPECT_NEAR(batch["percent_of_bound"].get<double>() / (100 * rate / bound), 1, 1e-9);
}

TEST_F(BenchDecode, CountsWhatAStepReads) {
  for (const std::string device : {"cpu", "cuda"}) {
    SCOPED_TRACE(device);
    const Json report = Report(0, model_, {"--device", device, "--kv-tokens", "1024"});
    ASSERT_EQ(report["batches"].size(), 1u);
    const Json& memory = report["memory"][0];
    EXPECT_EQ(BytesOf(memory, "attention"), kLayers * (2 * kHidden + 2 * kKvDim) * kHidden / 4);
    EXPECT_EQ(BytesOf(memory, "experts"), kLayers * kExperts * 3 * kHidden * kIntermediate / 4);
    EXPECT_EQ(memory["weights"]["experts"]["bits_per_weight"], 2.0);
    EXPECT_EQ(BytesOf(memory, "head"), kVocab * kHidden * 2);
    EXPECT_EQ(memory["kv"]["bytes"], 1024 * kKvTokenBytes);

    const Json& batch = report["batches"][0];
    EXPECT_EQ(batch["batch"], 1);
    EXPECT_EQ(batch["time"]["steps"], 4);
    EXPECT_EQ(batch["experts_of_layer"], kTopK);
    EXPECT_EQ(batch["weight_bytes"].get<double>(),
              BytesOfEveryStep(memory) + BytesOf(memory, "experts") * kTopK / kExperts);
    // Three of the prompt, one generated from it, four to warm up; then one more in each step.
    EXPECT_EQ(batch["kv_bytes"].get<double>(), (8 + 9 + 10 + 11) / 4.0 * kKvTokenBytes);
    if (device == "cpu") ExpectABoundOfItsReads(batch);
  }
}

// The exact wire gives the same tokens, and so the same experts, wherever they are.
TEST_F(BenchDecode, RanksReadWhatOneReads) {
  const Strings flags = {"--batch", "1,5", "--wire", "exact", "--kv-tokens", "1024"};
  const Json alone = Report(0, model_, flags);
  ASSERT_EQ(alone["batches"].size(), 2u);
  const Json& expected = alone["batches"][1];
  EXPECT_GT(expected["experts_of_layer"].get<double>(), kTopK) << "sequences differ";
  for (const std::string device : {"cpu", "cuda"}) {
    for (int ranks : {0, 2}) {
      SCOPED_TRACE(device + ", ranks: " + std::to_string(ranks));
      Strings on_device = flags;
      on_device.insert(on_device.end(), {"--device", device});
      const Json report = Report(ranks, model_, on_device);
      ASSERT_EQ(report["batches"].size(), 2u);
      const Json& batch = report["batches"][1];
      EXPECT_EQ(batch["experts_of_layer"], expected["experts_of_layer"]);
      EXPECT_NEAR(batch["kv_bytes"].get<double>(), expected["kv_bytes"].get<double>(), 1e-6);
      const double again = ranks == 2 ? BytesOfEveryStep(report["memory"][1]) : 0;
      EXPECT_EQ(batch["weight_bytes"].get<double>(),
                expected["weight_bytes"].get<double>() + again);
      if (ranks == 0) continue;
      EXPECT_EQ(batch["per_rank"][0]["rows"], 3);
      EXPECT_EQ(batch["per_rank"][1]["rows"], 2);
      // One sequence: the other rank reads experts only.
      EXPECT_EQ(report["batches"][0]["weight_bytes"], alone["batches"][0]["weight_bytes"]);
      if (device == "cpu") ExpectABoundOfItsReads(batch);
    }
  }
}

// relu2: CPUs skip what adds nothing, devices read all.
TEST_F(BenchDecode, LinesThatAreSkippedAreNotCounted) {
  for (const std::string device : {"cpu", "cuda"}) {
    SCOPED_TRACE(device);
    const Json report = Report(0, SourcePath("models/tiny"), {"--device", device});
    ASSERT_EQ(report["batches"].size(), 1u);
    const Json& memory = report["memory"][0];
    const double all = BytesOfEveryStep(memory) + BytesOf(memory, "experts") * 2 / 16;
    const double counted = report["batches"][0]["weight_bytes"];
    EXPECT_EQ(report["batches"][0]["experts_of_layer"], 2);
    if (device == "cuda") {
      EXPECT_EQ(counted, all);
    } else {
      EXPECT_LT(counted, all - 1e5);
    }
  }
}

TEST_F(BenchDecode, MemoryAddsUp) {
  for (int ranks : {1, 2}) {
    SCOPED_TRACE(ranks);
    const Json report = Report(ranks, model_, {});
    ASSERT_EQ(report["memory"].size(), static_cast<size_t>(ranks));
    for (int rank = 0; rank < ranks; ++rank) {
      const Json& memory = report["memory"][rank];
      double weights = 0;
      for (const auto& [kind, of] : memory["weights"].items()) weights += of["bytes"].get<double>();
      EXPECT_EQ(weights, report["per_rank"][rank]["weight_bytes"].get<double>());
      EXPECT_EQ(memory["rank"], rank);
      EXPECT_EQ(memory["where"], "host");
      EXPECT_EQ(memory["kv"]["tokens"], report["per_rank"][rank]["kv_tokens"]);
      EXPECT_GT(memory["rest_bytes"].get<double>(), 0);
      EXPECT_EQ(weights + memory["kv"]["bytes"].get<double>() + memory["rest_bytes"].get<double>() +
                    memory["left_bytes"].get<double>(),
                memory["bytes"].get<double>());
    }
  }
  const Json report = Report(0, model_, {"--device", "cuda"});
  ASSERT_EQ(report["memory"].size(), 1u);
  EXPECT_EQ(report["memory"][0]["where"], "device");
  EXPECT_EQ(report["memory"][0]["bytes"], 256 << 20);
}

// 1,200 tokens of prompts, in steps of at most 512: the first sequences generate long before the
// last.
TEST_F(BenchDecode, PromptsMayTakeManySteps) {
  const Json report =
      Report(0, model_, {"--batch", "40", "--prompt-tokens", "30", "--kv-tokens", "5120"});
  ASSERT_EQ(report["batches"].size(), 1u);
  EXPECT_EQ(report["batches"][0]["time"]["steps"], 4);
  EXPECT_EQ(report["batches"][0]["per_rank"][0]["rows"], 40);
}

TEST_F(BenchDecode, BadInputIsOneClearError) {
  ExpectError({"--batch", "0"}, "--batch");
  ExpectError({"--batch", "1,x"}, "--batch");
  ExpectError({"--batch", ""}, "--batch");
  ExpectError({"--tokens", "0"}, "--tokens");
  ExpectError({"--prompt-tokens", "0"}, "--prompt-tokens");
  ExpectError({"--tokens", "120"}, "the model has 128 positions");
  ExpectError({"--batch", "2,10", "--kv-tokens", "512"}, "(--kv-tokens)");
  ExpectError({"--batch", "2000"}, "a step has 512 rows");
  ExpectError({"--json", "/nowhere/report.json"}, "/nowhere/report.json");
  ExpectError({"--model", "/nowhere/model"}, "/nowhere/model");
}

}  // namespace
}  // namespace ternion::launcher
