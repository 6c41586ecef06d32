// `ternion run` and `ternion eval` as scripts see them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "launcher/npy.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

// A float32 array of two dimensions as eval writes it.
struct Matrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<float> values;
};

Matrix ReadNpy(const std::string& path) {
  const std::string bytes = ReadText(path);
  Matrix matrix;
  const size_t shape = bytes.find("'shape': (");
  if (shape == std::string::npos) return matrix;
  long long rows = 0, columns = 0;
  std::sscanf(&bytes[shape], "'shape': (%lld, %lld)", &rows, &columns);
  matrix = {rows, columns, std::vector<float>(rows * columns)};
  const size_t begin = bytes.find('\n') + 1;
  EXPECT_EQ(bytes.size() - begin, matrix.values.size() * sizeof(float)) << path;
  if (bytes.size() - begin == matrix.values.size() * sizeof(float)) {
    std::memcpy(matrix.values.data(), &bytes[begin], bytes.size() - begin);
  }
  return matrix;
}

class Command : public testing::Test {
 protected:
  // Runs, expects success, and returns what --json wrote.
  Json Report(int ranks, const Strings& more, const CommandOptions& options = {}) {
    const std::string json = directory_.path("report.json");
    std::filesystem::remove(json);
    Strings arguments = more;
    arguments.insert(arguments.end(), {"--model", model_, "--json", json});
    last_ = RunTernion(ranks, arguments, options);
    EXPECT_EQ(last_.exit_code, 0) << last_.err;
    return ReadJson(json);
  }

  const TempDir directory_;
  const std::string model_ = SourcePath("models/tiny");
  CommandResult last_;
};

void ExpectCounts(const Json& counts) {
  for (const char* key : {"payload_bytes", "message_bytes", "messages", "rows"}) {
    EXPECT_TRUE(counts.value(key, Json()).is_number_integer()) << key << " of " << counts;
  }
}

TEST_F(Command, RunReport) {
  const Json report = Report(2, {"run", "--prompt", "The ship was", "--max-tokens", "9"});
  EXPECT_EQ(report["ranks"], 2);
  for (const char* key : {"prefill_tok_s", "decode_tok_s", "load_seconds"}) {
    ASSERT_TRUE(report[key].is_number()) << key;
    EXPECT_GT(report[key].get<double>(), 0) << key;
  }
  EXPECT_EQ(report["logits_hash"].get<std::string>().find_first_not_of("0123456789abcdef"),
            std::string::npos);
  EXPECT_EQ(report["logits_hash"].get<std::string>().size(), 16u);
  ASSERT_EQ(report["prompts"].size(), 1u);
  const Json& prompt = report["prompts"][0];
  EXPECT_TRUE(prompt["text"].is_string());
  EXPECT_TRUE(prompt["finish_reason"] == "stop" || prompt["finish_reason"] == "length");
  EXPECT_EQ(prompt["finish_reason"] == "length", prompt["token_ids"].size() == 9u);
  EXPECT_EQ(report["wire"], (Json{{"dispatch", "int8"}, {"combine", "bf16"}, {"exact", false}}));
  EXPECT_EQ(report["kv"], "bf16");
  for (const char* phase : {"dispatch", "combine"}) {
    const Json& traffic = report["traffic"][phase];
    ExpectCounts(traffic);
    EXPECT_GT(traffic["payload_bytes"], 0);
    EXPECT_GT(traffic["message_bytes"], traffic["payload_bytes"]);
    for (const char* scope : {"self", "intra_node", "inter_node"}) ExpectCounts(traffic[scope]);
    EXPECT_EQ(traffic["inter_node"]["message_bytes"], 0);
    EXPECT_EQ(traffic["intra_node"]["message_bytes"], traffic["message_bytes"]);
  }
  ASSERT_EQ(report["per_rank"].size(), 2u);
  int experts = 0;
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(report["per_rank"][rank]["rank"], rank);
    experts += report["per_rank"][rank]["experts"].get<int>();
  }
  EXPECT_EQ(experts, 4 * 16);
}

TEST_F(Command, TextStreamsAndEndsWithOneSummaryLine) {
  const Json report = Report(2, {"run", "--prompt", "The ship was", "--max-tokens", "9"});
  EXPECT_EQ(last_.out, "The ship was" + report["prompts"][0]["text"].get<std::string>() + "\n");
  EXPECT_EQ(LinesThatStartWith(last_.err, "2 ranks: prefill ").size(), 1u) << last_.err;
}

TEST_F(Command, LiveFiguresAddUp) {
  for (const char* micro_batches : {"1", "2"}) {
    const Json report = Report(3, {"run", "--prompt", "The ship was", "--max-tokens", "9",
                                   "--micro-batches", micro_batches});
    const Json& bytes = report["bytes_per_token"];
    double sum = 0;
    for (const char* phase : {"dispatch", "combine"}) {
      const Json& traffic = report["traffic"][phase];
      const double sent = bytes[phase]["sent"];
      EXPECT_EQ(bytes[phase]["received"], bytes[phase]["sent"]);
      EXPECT_LE(sent, bytes[phase]["at_bf16"].get<double>());
      // "The ship was" is 4 tokens, with the one that starts a text.
      EXPECT_NEAR(sent * (4 + 9), traffic["message_bytes"].get<double>(), 1e-6);
      sum += sent;
    }
    EXPECT_NEAR(bytes["sent"].get<double>(), sum, 1e-9);
    EXPECT_NEAR(bytes["times_fewer_than_bf16"].get<double>(), bytes["at_bf16"].get<double>() / sum,
                1e-9);
    const Json& time = report["decode_time"];
    EXPECT_EQ(time["steps"], 8);
    const double step = time["step_ms"], wait = time["wait_ms"], wire = time["wire_ms"];
    EXPECT_NEAR(time["compute_ms"].get<double>() + wait, step, 1e-9);
    EXPECT_GT(wire, 0);
    EXPECT_LE(wire, step);
  }
}

TEST_F(Command, LiveFiguresCountEveryPromptOfADialogue) {
  const std::string json = directory_.path("dialogue.json");
  const CommandResult result = RunTernion(
      2, {"run", "--model", model_, "--interactive", "--max-tokens", "9", "--json", json},
      {.input = "The ship was\nThe ship was\n"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json report = Json::parse(ReadText(json));
  EXPECT_NEAR(report["bytes_per_token"]["dispatch"]["sent"].get<double>() * 2 * (4 + 9),
              report["traffic"]["dispatch"]["message_bytes"].get<double>(), 1e-6);
}

TEST_F(Command, OneRankSendsNothing) {
  const Json report = Report(1, {"run", "--prompt", "The ship was", "--max-tokens", "4"});
  EXPECT_EQ(report["traffic"]["dispatch"]["message_bytes"], 0);
  EXPECT_EQ(report["traffic"]["combine"]["message_bytes"], 0);
}

TEST_F(Command, SeedsDecideSampling) {
  const auto tokens = [&](int ranks, const char* seed) {
    return Report(
        ranks, {"run", "--prompt", "The", "--max-tokens", "24", "--temperature", "1.2", "--top-p",
                "0.95", "--wire", "exact", "--seed", seed})["prompts"][0]["token_ids"];
  };
  const Json first = tokens(0, "7");
  EXPECT_EQ(tokens(0, "7"), first);
  EXPECT_EQ(tokens(3, "7"), first);
  EXPECT_NE(tokens(0, "8"), first);
}

TEST_F(Command, AnyInstructionSet) {
  std::set<std::string> hashes, isas;
  for (const std::string isa : kernels::AvailableIsas()) {
    const Json report =
        Report(0, {"run", "--prompt", "The ship was", "--max-tokens", "6", "--wire", "exact"},
               {.environment = {{"TERNION_ISA", isa}}});
    hashes.insert(report["logits_hash"]);
    isas.insert(report["per_rank"][0]["isa"]);
  }
  EXPECT_EQ(hashes.size(), 1u);
  EXPECT_EQ(isas.size(), kernels::AvailableIsas().size());
}

TEST_F(Command, UnknownInstructionSet) {
  for (int ranks : {0, 3}) {
    const CommandResult result = RunTernion(ranks, {"run", "--model", model_, "--prompt", "x"},
                                            {.environment = {{"TERNION_ISA", "nonsense"}}});
    EXPECT_EQ(result.exit_code, 1);
    const Strings lines = LinesThatStartWith(result.err, "ternion: error:");
    ASSERT_EQ(lines.size(), 1u) << result.err;
    EXPECT_NE(lines[0].find("TERNION_ISA=nonsense"), std::string::npos) << lines[0];
    EXPECT_NE(lines[0].find("scalar"), std::string::npos) << lines[0];
  }
}

TEST_F(Command, EvalReport) {
  const std::string text = directory_.path("text.txt");
  WriteText(text, ReadText(SourcePath("models/tiny/test.txt")).substr(0, 6000));
  const Json alone = Report(0, {"eval", "--text", text, "--wire", "exact"});
  EXPECT_EQ(alone["bytes"], 6000);
  EXPECT_GT(alone["tokens"], 600);
  const double nll = alone["nll"];
  EXPECT_NEAR(alone["bits_per_byte"], nll / std::log(2.0) / 6000, 1e-9);
  EXPECT_NEAR(alone["perplexity"], std::exp(nll / alone["tokens"].get<double>()), 1e-6);
  EXPECT_LT(alone["bits_per_byte"], 3.0);  // it has learned something
  const Json three = Report(3, {"eval", "--text", text, "--wire", "exact"});
  EXPECT_EQ(three["tokens"], alone["tokens"]);
  // The same terms; the ranks' sums may be added in another order.
  EXPECT_NEAR(three["nll"], nll, 1e-9 * nll);
}

const Json& FindRung(const Json& ladder, const Json& keys) {
  const auto matches = [&](const Json& rung) {
    return std::all_of(keys.items().begin(), keys.items().end(),
                       [&](const auto& item) { return rung[item.key()] == item.value(); });
  };
  const auto found = std::find_if(ladder.begin(), ladder.end(), matches);
  EXPECT_NE(found, ladder.end()) << keys;
  return found == ladder.end() ? ladder.front() : *found;
}

TEST_F(Command, LadderComparesWithTheExactWire) {
  const std::string text = directory_.path("text.txt");
  WriteText(text, ReadText(SourcePath("models/tiny/test.txt")).substr(0, 3000));
  const Json eval = Report(3, {"eval", "--text", text, "--wire", "exact"});
  const Json report = Report(3, {"eval", "--text", text, "--ladder"});
  EXPECT_EQ(report["tokens"], eval["tokens"]);
  EXPECT_EQ(report["ranks"], 3);
  const Json& ladder = report["ladder"];
  const Json& reference = ladder.front();
  EXPECT_EQ(reference["exact"], true);
  EXPECT_NEAR(reference["bits_per_byte"], eval["bits_per_byte"].get<double>(), 1e-9);
  for (const Json& rung : ladder) {
    EXPECT_NEAR(
        rung["change_percent"],
        100 * (rung["bits_per_byte"].get<double>() / reference["bits_per_byte"].get<double>() - 1),
        1e-9);
    EXPECT_GE(rung["kl_p999"], rung["kl_mean"]) << rung;
    EXPECT_GT(rung["dispatch_bytes_per_token"], 0) << rung;
  }
  // Rows that the experts round anyway: the same bits whatever carried them.
  const Json& fp32 = FindRung(ladder, {{"exact", true}, {"dispatch", "fp32"}});
  EXPECT_EQ(fp32["change_percent"], 0);
  EXPECT_EQ(fp32["kl_p999"], 0);
  EXPECT_EQ(fp32["same_top_percent"], 100);
  // Coarser is worse, and smaller.
  const Json& int8 = FindRung(ladder, {{"combine", "int8"}, {"kv", "bf16"}});
  const Json& int4 = FindRung(ladder, {{"combine", "int4"}, {"kv", "bf16"}});
  const Json& int3_cache = FindRung(ladder, {{"combine", "int8"}, {"kv", "int3"}});
  EXPECT_GT(int8["kl_mean"], 0);
  EXPECT_GT(int4["kl_mean"], int8["kl_mean"]);
  EXPECT_LT(int4["combine_bytes_per_token"], int8["combine_bytes_per_token"]);
  EXPECT_GT(int3_cache["kl_mean"], int8["kl_mean"]);
  EXPECT_LT(int3_cache["kv_bytes_per_token"], int8["kv_bytes_per_token"]);
}

// The checkpoints that the PyTorch oracle wrote, on two processes.
TEST_F(Command, EvalLogitsMatchTheOracle) {
  for (const char* name :
       {"bitnet_moe_odd_vocab1003", "qwen3_moe_bitlinear_sharded", "bitnet_relu2_tied"}) {
    SCOPED_TRACE(name);
    const std::string golden = SourcePath("tests/oracle/golden/") + name;
    const std::string out = directory_.path("logits.npy");
    const CommandResult result =
        RunTernion(2, {"eval", "--model", golden, "--ids-file", golden + "/ids.json",
                       "--logits-out", out, "--wire", "exact"});
    ASSERT_EQ(result.exit_code, 0) << result.err;
    const Matrix expected = ReadNpy(golden + "/logits.npy"), actual = ReadNpy(out);
    EXPECT_EQ(actual.rows, static_cast<int64_t>(ReadJson(golden + "/ids.json").size()));
    EXPECT_EQ(actual.columns, ReadJson(golden + "/config.json")["vocab_size"]);
    ASSERT_EQ(actual.rows, expected.rows);
    ASSERT_EQ(actual.columns, expected.columns);
    for (size_t i = 0; i < expected.values.size(); ++i) {
      ASSERT_NEAR(actual.values[i], expected.values[i], 1e-3) << "element " << i;
    }
  }
}

TEST_F(Command, PromptsOfAFileAreNumbered) {
  const std::string prompts = directory_.path("prompts.txt");
  WriteText(prompts, "The ship was\r\nA man\nno newline at the end");
  const Json report = Report(2, {"run", "--prompt-file", prompts, "--max-tokens", "3"});
  ASSERT_EQ(report["prompts"].size(), 3u);
  EXPECT_EQ(report["prompts"][0]["prompt"], "The ship was");
  EXPECT_EQ(report["prompts"][2]["prompt"], "no newline at the end");
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(LinesThatStartWith(last_.out, absl::StrCat("[", i + 1, "] ")).size(), 1u)
        << last_.out;
  }
}

TEST_F(Command, InteractiveEndsWithItsInput) {
  for (int ranks : {0, 2}) {
    const CommandResult result =
        RunTernion(ranks, {"run", "--model", model_, "-i", "--max-tokens", "4"},
                   {.input = "The ship\n\n" + std::string(9000, 'z') + "\nA man\n"});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_NE(result.out.find("The ship"), std::string::npos) << result.out;
    EXPECT_NE(result.out.find("A man"), std::string::npos) << "after a prompt that is too long";
  }
}

// Text of any bytes goes through, and the report stays JSON.
TEST_F(Command, PromptsOfAnyBytes) {
  for (const std::string prompt :
       {"two\nlines", "\U0001f680\U0001f468\u200d\U0001f469", "broken \xff\xc3 utf-8"}) {
    const Json report = Report(0, {"run", "--prompt", prompt, "--max-tokens", "4"});
    EXPECT_TRUE(report.is_object()) << prompt;
    EXPECT_TRUE(last_.out.starts_with(prompt));
  }
}

TEST_F(Command, GenerationEndsWithTheModelsPositions) {
  const Json report = Report(2, {"run", "--prompt", "The", "--max-tokens", "1048576"});
  const size_t tokens = report["prompts"][0]["token_ids"].size();
  EXPECT_GT(tokens, 0u);
  EXPECT_LE(tokens, 512u);
}

TEST_F(Command, MoreRanksAndThreadsThanCores) {
  const Json report =
      Report(8, {"run", "--prompt", "The ship was", "--max-tokens", "8", "--wire", "exact"});
  const Json alone = Report(0, {"run", "--prompt", "The ship was", "--max-tokens", "8", "--wire",
                                "exact", "--threads", "32"});
  EXPECT_EQ(report["logits_hash"], alone["logits_hash"]);
  EXPECT_EQ(alone["per_rank"][0]["threads"], 32);
}

TEST_F(Command, Help) {
  for (const Strings& words :
       {Strings{}, {"run"}, {"eval"}, {"bench"}, {"bench", "kernels"}, {"inspect"}, {"synth"}}) {
    for (int ranks : {0, 2}) {
      Strings arguments = words;
      arguments.push_back("--help");
      const CommandResult result = RunTernion(ranks, arguments);
      EXPECT_EQ(result.exit_code, 0) << result.err;
      EXPECT_EQ(LinesThatStartWith(result.out, "Usage: ternion").size(), 1u) << result.out;
      if (words.size() > 0 && ranks == 2) break;
    }
  }
}

TEST(NpyHeader, IsWhatNumpyReads) {
  for (int64_t rows : {int64_t{1}, int64_t{12}, int64_t{123456789}}) {
    const std::string header = NpyHeader(rows, 4096);
    EXPECT_EQ(header.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
    EXPECT_EQ(header.size() % 64, 0u);
    const size_t dict = static_cast<uint8_t>(header[8]) + 256 * static_cast<uint8_t>(header[9]);
    EXPECT_EQ(header.size(), 10 + dict);
    EXPECT_EQ(header.back(), '\n');
    EXPECT_EQ(header.find("{'descr': '<f4', 'fortran_order': False, 'shape': (" +
                          std::to_string(rows) + ", 4096), }"),
              10u);
  }
}

}  // namespace
}  // namespace ternion::launcher
