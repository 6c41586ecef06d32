// Models whose first layers have no experts. That their logits are right is golden_test's to say
// (bitnet_moe_dense_first).
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "experts/trace.h"
#include "gtest/gtest.h"
#include "tests/runtime/engine_support.h"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsInvalid;
using Json = nlohmann::json;

// Five layers of which two are dense, drawn when they are loaded.
Json ConfigOf(bool int4_rows) {
  Json config = Json::parse(R"({
    "model_type": "bitnet_moe", "vocab_size": 4096, "hidden_size": 84, "num_hidden_layers": 5,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
    "max_position_embeddings": 512, "first_k_dense_replace": 2, "intermediate_size": 150,
    "num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 46,
    "norm_topk_prob": true, "random_weights_seed": 5,
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                            "quantization_mode": "offline"}})");
  if (int4_rows) {
    config.update({{"act_bits", 4}, {"kv_bits", 3}, {"hidden_act", "relu2"}});
  } else {
    config["shared_expert_intermediate_size"] = 200;  // wider than what is dense
  }
  return config;
}

class DenseLayers : public testing::TestWithParam<bool> {
 protected:
  DenseLayers() {
    directory_.Write("config.json", ConfigOf(GetParam()).dump());
    requests_.resize(6);
  }

  WorldCase Case(int num_ranks) const {
    return {.num_ranks = num_ranks, .max_rows = 33, .model = directory_.path()};
  }
  std::string Trace(int num_layers) const {
    const std::string path = directory_.path("trace.bin");
    EXPECT_TRUE(
        experts::SaveTrace(*experts::ZipfTrace(1, 1, {num_layers, 300, kExperts, 3}), path).ok());
    return path;
  }

  const test::TempDir directory_;
  std::vector<Request> requests_ = ManyPrompts();
};
INSTANTIATE_TEST_SUITE_P(Rows, DenseLayers, testing::Bool(),
                         [](const auto& info) { return info.param ? "Int4" : "Int8"; });

TEST_P(DenseLayers, AnyNumberOfRanksAndMicroBatchesGiveTheSameBits) {
  const std::vector<Outcome> expected = Generate(Case(1), requests_);
  EXPECT_NE(expected[0].logits_hash, expected[1].logits_hash);
  for (int num_ranks = 1; num_ranks <= 4; ++num_ranks) {
    for (const int micro_batches : {1, 2}) {
      WorldCase c = Case(num_ranks);
      c.micro_batches = micro_batches;
      EXPECT_EQ(Generate(c, requests_), expected) << num_ranks << ", " << micro_batches;
    }
  }
}

// Placements and traces have the layers with experts, and no others.
TEST_P(DenseLayers, AnyPlacementGivesTheSameBits) {
  const std::vector<Outcome> expected = Generate(Case(1), requests_);
  Json layers = Json::array();
  for (int layer = 0; layer < 3; ++layer) {  // all experts of a layer on a rank of its own
    layers.push_back(std::vector<int>(kExperts, 2 - layer));
  }
  WorldCase c = Case(3);
  c.placement = directory_.Write("placement.json", Json{{"layers", layers}}.dump());
  EXPECT_EQ(Generate(c, requests_), expected);
  c.trace = Trace(3);
  for (const char* placement : {"balanced", "local"}) {
    c.placement = placement;
    EXPECT_EQ(Generate(c, requests_), expected) << placement;
  }
}

TEST_P(DenseLayers, PlacementsOfOtherLayersAreRefused) {
  const auto error_of = [](const WorldCase& c) {
    return RunEngines(c, [](Engine&) { return absl::OkStatus(); })[0];
  };
  WorldCase c = Case(2);
  const Json layers(5, Json(std::vector<int>(kExperts, 0)));
  c.placement = directory_.Write("placement.json", Json{{"layers", layers}}.dump());
  EXPECT_TRUE(IsInvalid(error_of(c), "one array for each of 3 layers with experts"));
  c.placement = "local";
  c.trace = Trace(5);
  EXPECT_TRUE(IsInvalid(error_of(c), "the trace has 5 layers with experts, the model 3"));
}

TEST_P(DenseLayers, HierarchicalExchange) {
  requests_.resize(3);
  WorldCase c = Case(4);
  c.wire = {};
  c.hierarchical = true;
  c.node_of = {0, 1, 0, 1};
  const std::vector<Outcome> expected = Generate(c, requests_);
  EXPECT_EQ(expected[0].tokens.size(), 8u);
  c.micro_batches = 2;
  EXPECT_EQ(Generate(c, requests_), expected);
}

TEST_P(DenseLayers, TheSinkHearsOfLayersWithExperts) {
  std::vector<int> heard;
  const auto statuses = RunEngines(Case(1), [&](Engine& engine) -> absl::Status {
    engine.set_routing_sink([&](SequenceId, int32_t, int layer, std::span<const int32_t> experts) {
      heard.push_back(layer);
      EXPECT_EQ(std::set<int32_t>(experts.begin(), experts.end()).size(), 3u);
    });
    TERNION_RETURN_IF_ERROR(engine.Submit(RandomPrompt(1, 1, 1)).status());
    std::map<SequenceId, Outcome> outcomes;
    return RunToEnd(engine, outcomes);
  });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
  EXPECT_EQ(heard, std::vector<int>({0, 1, 2}));
}

}  // namespace
}  // namespace ternion::runtime
