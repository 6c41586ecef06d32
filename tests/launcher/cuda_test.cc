// `--device cuda` on the emulated device: the same bits as on the CPU, whatever the exchange.
#include <ostream>
#include <string>

#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

struct Case {
  std::string name;
  int ranks;
  std::string model;
  Strings flags;

  friend std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }
};

class CudaDevice : public testing::TestWithParam<Case> {};

// The report of a run on `device`.
Json ReportOf(const Case& c, const std::string& device, const TempDir& place) {
  const std::string json = place.path(device + ".json");
  WriteText(
      place.path("prompts.txt"),
      "Candle, n. 1. A\nThe ship was\nIt was the best of times, it was the worst of times; it "
      "was the age of wisdom, it was the age of foolishness, it was the epoch of belief\n");
  Strings arguments = {"run",
                       "--model",
                       c.model.starts_with("/") ? c.model : SourcePath("models/" + c.model),
                       "--device",
                       device,
                       "--prompt-file",
                       place.path("prompts.txt"),
                       "--max-tokens",
                       "5",
                       "--temperature",
                       "0",
                       "--json",
                       json};
  arguments.insert(arguments.end(), c.flags.begin(), c.flags.end());
  const CommandResult result = RunTernion(c.ranks, arguments);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  return result.exit_code == 0 ? ReadJson(json) : Json();
}

TEST_P(CudaDevice, GivesTheBitsOfTheCpu) {
  TempDir place;
  const Json cpu = ReportOf(GetParam(), "cpu", place);
  const Json cuda = ReportOf(GetParam(), "cuda", place);
  ASSERT_TRUE(cpu.contains("logits_hash") && cuda.contains("logits_hash"));
  EXPECT_EQ(cuda["logits_hash"], cpu["logits_hash"]);
  ASSERT_EQ(cuda["prompts"].size(), cpu["prompts"].size());
  for (size_t i = 0; i < cpu["prompts"].size(); ++i) {
    EXPECT_EQ(cuda["prompts"][i]["token_ids"], cpu["prompts"][i]["token_ids"]);
  }
}

// A KV cache that leaves hardly any of the device's 256 MB.
TEST(CudaMemory, WeightsThatDoNotFitArePackedInBase3) {
  TempDir place;
  const Case roomy = {"Roomy", 1, "tiny", {"--kv-tokens", "1000"}};
  const Case full = {"Full", 1, "tiny", {"--kv-tokens", "130000"}};
  const Json two_bits = ReportOf(roomy, "cuda", place), base3 = ReportOf(full, "cuda", place);
  ASSERT_TRUE(two_bits.contains("logits_hash") && base3.contains("logits_hash"));
  EXPECT_LT(base3["per_rank"][0]["weight_bytes"], two_bits["per_rank"][0]["weight_bytes"]);
  EXPECT_EQ(base3["logits_hash"], two_bits["logits_hash"]);
}

// Weights that are drawn when the model is loaded: by the device, straight into either layout, and
// by the host. Two layers are dense.
TEST(CudaDraw, GivesTheWeightsThatTheHostDraws) {
  TempDir place;
  const Json config = {{"model_type", "bitnet_moe"},
                       {"vocab_size", 256},
                       {"hidden_size", 252},
                       {"num_hidden_layers", 4},
                       {"num_attention_heads", 4},
                       {"num_key_value_heads", 2},
                       {"head_dim", 48},
                       {"max_position_embeddings", 512},
                       {"first_k_dense_replace", 2},
                       {"intermediate_size", 250},
                       {"num_experts", 6},
                       {"num_experts_per_tok", 2},
                       {"moe_intermediate_size", 126},
                       {"shared_expert_intermediate_size", 101}};
  WriteText(place.path("small.json"), config.dump());
  const std::string model = place.path("model");
  ASSERT_EQ(RunTernion(0, {"synth", "--config", place.path("small.json"), "--seed", "11",
                           "--seed-only", "--out", model})
                .exit_code,
            0);
  const Case roomy = {"Roomy", 1, model, {"--kv-tokens", "1000"}};
  const Case full = {"Full", 1, model, {"--kv-tokens", "172032"}};  // leaves nothing of 256 MB
  const Json host = ReportOf(roomy, "cpu", place), two_bits = ReportOf(roomy, "cuda", place),
             base3 = ReportOf(full, "cuda", place);
  for (const Json& report : {host, two_bits, base3}) ASSERT_TRUE(report.contains("logits_hash"));
  EXPECT_EQ(two_bits["logits_hash"], host["logits_hash"]);
  EXPECT_LT(base3["per_rank"][0]["weight_bytes"], two_bits["per_rank"][0]["weight_bytes"]);
  EXPECT_EQ(base3["logits_hash"], host["logits_hash"]);
  const Case ranks = {"Ranks", 2, model, {"--wire", "exact", "--micro-batches", "2"}};
  EXPECT_EQ(ReportOf(ranks, "cuda", place)["logits_hash"],
            ReportOf(ranks, "cpu", place)["logits_hash"]);
}

INSTANTIATE_TEST_SUITE_P(
    Exchanges, CudaDevice,
    testing::Values(Case{"OneRank", 1, "tiny", {"--wire", "exact"}},
                    Case{"OneRankPresum", 1, "tiny-a48", {"--micro-batches", "2"}},
                    Case{"TwoRanksExact", 2, "tiny", {"--wire", "exact"}},
                    Case{"ThreeRanks", 3, "tiny", {}},
                    Case{"MicroBatches", 3, "tiny-a48", {"--micro-batches", "2"}},
                    Case{"Int4BothWays", 2, "tiny-a48", {"--wire-combine", "int4"}},
                    Case{"FloatDispatch",
                         2,
                         "tiny",
                         {"--wire-dispatch", "bf16", "--wire-combine", "int8", "--kv", "int4"}},
                    Case{
                        "Hierarchical", 2, "tiny", {"--kv", "int8", "--exchange", "hierarchical"}}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace ternion::launcher
