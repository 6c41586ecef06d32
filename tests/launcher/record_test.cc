// `eval --record-trace`: the same file from any number of ranks, and a placement made from it.
#include <map>
#include <string>

#include "experts/trace.h"
#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

class Record : public testing::Test {
 protected:
  // Several windows of the model's 512 positions.
  Record() { WriteText(text_, ReadText(SourcePath("models/tiny/test.txt")).substr(0, 6000)); }

  // The bytes of the trace that is written, with the report in json_.
  std::string Eval(int ranks, const Strings& more) {
    const std::string trace = directory_.path("trace.bin");
    std::filesystem::remove(trace);
    Strings arguments = {"eval",
                         "--model",
                         model_,
                         "--text",
                         text_,
                         "--json",
                         directory_.path("eval.json"),
                         "--record-trace",
                         trace};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const CommandResult result = RunTernion(ranks, arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(LinesThatStartWith(result.out, trace).size(), 1u) << result.out;
    json_ = ReadJson(directory_.path("eval.json"));
    return ReadText(trace);
  }

  const TempDir directory_;
  const std::string text_ = directory_.path("text.txt");
  std::string model_ = SourcePath("models/tiny");
  Json json_;
};

TEST_F(Record, EveryTokenOnceWhateverTheRanks) {
  const std::string alone = Eval(0, {});
  const auto trace = experts::LoadTrace(directory_.path("trace.bin"));
  ASSERT_TRUE(trace.ok()) << trace.status();
  const int64_t tokens = json_["tokens"].get<int64_t>() + 1;  // bos predicts the first
  EXPECT_GT(tokens, 1024);
  EXPECT_EQ(trace->shape, (experts::TraceShape{4, tokens, 16, 2}));
  char hash[17];
  std::snprintf(hash, sizeof(hash), "%016llx", static_cast<unsigned long long>(trace->Hash()));
  EXPECT_EQ(json_["trace_hash"], hash);
  // A text's tokens do not all go the same way.
  std::map<uint16_t, int> seen;
  for (int64_t token = 0; token < tokens; ++token) ++seen[trace->ExpertsOf(0, token)[0]];
  EXPECT_GT(seen.size(), 4u);

  EXPECT_EQ(Eval(2, {}), alone);
  EXPECT_EQ(Eval(3, {"--micro-batches", "2"}), alone);
}

// A layer without experts is in no trace, and asks for no placement.
TEST_F(Record, LayersWithExpertsOnly) {
  const Json config = {
      {"model_type", "bitnet_moe"}, {"vocab_size", 256},          {"hidden_size", 64},
      {"num_hidden_layers", 3},     {"num_attention_heads", 4},   {"max_position_embeddings", 512},
      {"first_k_dense_replace", 1}, {"intermediate_size", 96},    {"num_experts", 6},
      {"num_experts_per_tok", 2},   {"moe_intermediate_size", 32}};
  WriteText(directory_.path("small.json"), config.dump());
  model_ = directory_.path("model");
  ASSERT_EQ(RunTernion(0, {"synth", "--config", directory_.path("small.json"), "--out", model_})
                .exit_code,
            0);
  const std::string alone = Eval(0, {});
  const auto trace = experts::LoadTrace(directory_.path("trace.bin"));
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->shape, (experts::TraceShape{2, 6000, 6, 2}));
  const std::string recorded = directory_.path("recorded.bin");
  WriteText(recorded, alone);
  for (const char* placement : {"balanced", "local"}) {
    EXPECT_EQ(Eval(3, {"--placement", placement, "--trace", recorded}), alone) << placement;
  }
}

TEST_F(Record, PlacementsFromARecordedTraceChangeNothing) {
  const std::string trace = Eval(0, {});
  const double nll = json_["nll"];
  const std::string recorded = directory_.path("recorded.bin");
  WriteText(recorded, trace);
  for (const char* placement : {"balanced", "local"}) {
    EXPECT_EQ(Eval(3, {"--placement", placement, "--trace", recorded}), trace) << placement;
    EXPECT_NEAR(json_["nll"].get<double>(), nll, 1e-9 * nll);  // ranks' sums in another order
  }
}

}  // namespace
}  // namespace ternion::launcher
