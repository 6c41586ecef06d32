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
    Strings arguments = {"eval", "--model", SourcePath("models/tiny"),    "--text",
                         text_,  "--json",  directory_.path("eval.json"), "--record-trace",
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
