// `ternion bench exchange` as a user runs it, small.
#include <cstring>
#include <map>
#include <string>

#include "absl/strings/str_format.h"
#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

class BenchExchange : public testing::Test {
 protected:
  Json Report(int ranks, const Strings& more) {
    Strings arguments = {"bench", "exchange", "--seconds", "0", "--json", json_};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const CommandResult result = RunTernion(ranks, arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return ReadJson(json_);
  }

  void ExpectError(int ranks, const Strings& more, const std::string& text) {
    SCOPED_TRACE(text);
    std::filesystem::remove(json_);
    Strings arguments = {"bench", "exchange", "--seconds", "0", "--json", json_};
    arguments.insert(arguments.end(), more.begin(), more.end());
    // Where there is a GPU, it is not to be found.
    const CommandResult result =
        RunTernion(ranks, arguments, {.environment = {{"CUDA_VISIBLE_DEVICES", ""}}});
    EXPECT_NE(result.exit_code, 0);
    EXPECT_FALSE(result.timed_out);
    const Strings lines = LinesThatStartWith(result.err, "ternion: error: ");
    ASSERT_EQ(lines.size(), 1u) << result.err;
    EXPECT_NE(lines[0].find(text), std::string::npos) << lines[0];
    EXPECT_FALSE(std::filesystem::exists(json_));
  }

  static Json Case(const Json& report, const std::string& wire) {
    for (const Json& result : report["cases"]) {
      if (result["wire"] == wire) return result;
    }
    ADD_FAILURE() << "no case " << wire;
    return {};
  }

  const TempDir directory_;
  const std::string json_ = directory_.path("report.json");
};

const Strings kSmall = {"--hidden", "512", "--experts", "16", "--top-k", "4"};

Strings With(Strings arguments, const Strings& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST_F(BenchExchange, EveryWireIsRightAndCounted) {
  const Json report =
      Report(3, With(kSmall, {"--tokens", "5,64", "--matrix", directory_.path("matrix.csv")}));
  EXPECT_EQ(report["ranks"], 3);
  for (const Json& result : report["cases"]) {
    EXPECT_TRUE(result["verified"].get<bool>()) << result["wire"];
    EXPECT_GE(result["iterations"].get<int>(), 1);
    // At least a third of what three ranks send goes over the busiest link.
    const double bytes = result["per_token_and_layer"]["message_bytes"];
    const double busiest = result["per_token_and_layer"]["bottleneck_link_bytes"];
    EXPECT_GE(busiest, bytes / 3 - 1e-6) << result["wire"];
    EXPECT_LT(busiest, bytes / 2) << result["wire"];
  }
  std::map<std::string, double> bytes;  // the last table's
  for (const Json& result : report["cases"]) {
    bytes[result["wire"]] = result["per_token_and_layer"]["message_bytes"];
  }
  EXPECT_GT(bytes["bf16/bf16"], 3 * bytes["int4/int4"]);
  EXPECT_GT(bytes["bf16/bf16, no dedup"], bytes["bf16/bf16"]);
  EXPECT_GT(bytes["int4/int4, no pre-sum"], bytes["int4/int4"]);
  EXPECT_EQ(bytes["int4/int4, alltoallv"], bytes["int4/int4"]) << "the same messages";
  // A row to both other ranks and one back, whatever the routing.
  EXPECT_NEAR(bytes["bf16/bf16, allgather"], 2 * (1024 + 1024), 100);
  const Json last = report["cases"].back();
  EXPECT_EQ(last["sent_bytes"].size(), 3u);
  EXPECT_EQ(last["sent_bytes"][1][1], 0) << "own rows do not travel";
  const std::string matrix = ReadText(directory_.path("matrix.csv"));
  EXPECT_EQ(LinesThatStartWith(matrix, "").size(), 3u);
  EXPECT_NE(matrix.find("1.000000"), std::string::npos) << "the largest entry";
  const Json wide = Case(report, "int8/bf16");
  EXPECT_GT(wide["efficiency"].get<double>(), 0.9);
  EXPECT_LE(wide["efficiency"].get<double>(), 1.0);
}

TEST_F(BenchExchange, BytesFollowFromTheSeed) {
  const Strings zipf = With(kSmall, {"--tokens", "16", "--routing", "zipf", "--seed", "7"});
  const Json first = Report(2, zipf), second = Report(2, zipf);
  EXPECT_EQ(first["trace_hash"], second["trace_hash"]);
  for (size_t i = 0; i < first["cases"].size(); ++i) {
    EXPECT_EQ(first["cases"][i]["per_token_and_layer"], second["cases"][i]["per_token_and_layer"]);
    EXPECT_EQ(first["cases"][i]["output_hash"], second["cases"][i]["output_hash"]);
  }
  EXPECT_NE(Report(2, With(zipf, {"--zipf", "2"}))["trace_hash"], first["trace_hash"]);
}

TEST_F(BenchExchange, ASavedTraceIsTheSameTrace) {
  const std::string trace = directory_.path("saved.trace");
  const Json made = Report(2, With(kSmall, {"--tokens", "16", "--save-trace", trace}));
  const Json read = Report(2, {"--hidden", "512", "--tokens", "16", "--trace", trace});
  EXPECT_EQ(read["trace_hash"], made["trace_hash"]);
  ASSERT_EQ(read["cases"].size(), made["cases"].size());
  for (size_t i = 0; i < made["cases"].size(); ++i) {
    EXPECT_EQ(read["cases"][i]["per_token_and_layer"], made["cases"][i]["per_token_and_layer"]);
  }
}

TEST_F(BenchExchange, WhatIsReceivedIsWhatWasSent) {
  const Json report = Report(3, With(kSmall, {"--tokens", "8"}));
  EXPECT_TRUE(report["error"].is_null());
  for (const Json& result : report["cases"]) {
    EXPECT_EQ(result["peak_memory_bytes"].size(), 3u);
    for (int from = 0; from < 3; ++from) {
      for (int to = 0; to < 3; ++to) {
        EXPECT_EQ(result["sent_bytes"][from][to], result["received_bytes"][to][from]);
      }
    }
  }
}

TEST_F(BenchExchange, ARecordedTraceAndALadder) {
  const std::string trace = directory_.path("text.trace");
  const CommandResult recorded =
      RunTernion(0, {"eval", "--model", SourcePath("models/tiny"), "--text",
                     SourcePath("models/tiny/README.md"), "--record-trace", trace});
  ASSERT_EQ(recorded.exit_code, 0) << recorded.err;
  const Json report = Report(2, {"--hidden", "256", "--trace", trace, "--tokens", "20", "--ladder",
                                 SourcePath("docs/results/quality-tiny.json")});
  EXPECT_EQ(report["experts"], 16);
  EXPECT_EQ(report["top_k"], 2);
  EXPECT_TRUE(Case(report, "int8/int4")["quality_change_percent"].is_number());
  EXPECT_TRUE(Case(report, "int4/int4")["quality_change_percent"].is_null())
      << "not in that ladder";
  // The name that a trace file carries (docs/trace.md).
  uint64_t checksum = 0;
  std::memcpy(&checksum, ReadText(trace).data() + 40, sizeof(checksum));
  EXPECT_EQ(report["trace_hash"], absl::StrFormat("%016x", checksum));
  ExpectError(2, {"--hidden", "256", "--trace", trace, "--experts", "64"},
              "is a trace of 16 experts, not of 64");
}

TEST_F(BenchExchange, OneRankSendsNothing) {
  const Json report = Report(0, With(kSmall, {"--tokens", "8"}));
  EXPECT_EQ(Case(report, "int4/int4")["per_token_and_layer"]["message_bytes"], 0);
  EXPECT_TRUE(Case(report, "int4/int4")["verified"].get<bool>());
}

TEST_F(BenchExchange, RanksWithoutExpertsTakePart) {
  const Json report =
      Report(4, {"--hidden", "64", "--experts", "3", "--top-k", "2", "--tokens", "4"});
  for (const Json& result : report["cases"]) EXPECT_TRUE(result["verified"].get<bool>());
}

TEST_F(BenchExchange, BadInputIsOneClearError) {
  ExpectError(2, {}, "give --shape, or --hidden with --experts and --top-k");
  ExpectError(2, {"--shape", "bitnet-2b"}, "has no experts");
  ExpectError(2, {"--shape", "llama"}, "no shape \"llama\"");
  ExpectError(2, With(kSmall, {"--tokens", "0"}), "--tokens");
  ExpectError(2, {"--hidden", "64", "--experts", "4", "--top-k", "5"}, "top_k");
  ExpectError(2, With(kSmall, {"--trace", directory_.path("none")}), "none");
  ExpectError(2, With(kSmall, {"--ladder", SourcePath("models/tiny/config.json")}),
              "is no report of eval --ladder");
  ExpectError(2, With(kSmall, {"--matrix", directory_.path("no/such/folder")}), "no/such/folder");
  ExpectError(2, {"--shape", "deepseek-v3", "--tokens", "1000000"}, "this machine has");
  ExpectError(2, With(kSmall, {"--transport", "nccl"}), "between GPUs) needs --device cuda");
  ExpectError(2, With(kSmall, {"--device", "cuda"}), "--device cuda: ");
}

}  // namespace
}  // namespace ternion::launcher
