// The promise of the whole: any number of ranks, any placement, any company of other prompts give
// the same bits with --wire exact.
#include <functional>
#include <set>
#include <string>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "launcher/commands.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

constexpr int kMaxTokens = 12;

// Sixteen prompts, from one character to several hundred tokens: they do not fit one step together.
Strings Prompts() {
  Strings prompts = {"A",
                     "The ship was",
                     "In the beginning",
                     "He said that he",
                     "What is",
                     "3.14159",
                     "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f680",
                     "  two  spaces\tand a tab",
                     "def main(argc, argv):",
                     "She went to the",
                     "Of all the",
                     "(c) 1913"};
  const std::string sentence = "It was the best of times, it was the worst of times; ";
  for (int copies : {2, 5, 9, 14}) {
    std::string& prompt = prompts.emplace_back();
    for (int i = 0; i < copies; ++i) prompt += sentence;
    prompt.pop_back();
  }
  return prompts;
}

std::string Join(const Strings& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

// What must not depend on anything but the prompts.
struct Outcome {
  std::string hash;
  std::vector<std::string> hashes;           // by prompt
  std::vector<std::vector<int32_t>> tokens;  // by prompt

  explicit Outcome(const Json& json) : hash(json.value("logits_hash", "")) {
    for (const Json& prompt : json.value("prompts", Json::array())) {
      hashes.push_back(prompt["logits_hash"]);
      tokens.push_back(prompt["token_ids"]);
    }
  }
  bool operator==(const Outcome&) const = default;
};

void PrintTo(const Outcome& outcome, std::ostream* stream) {
  *stream << outcome.hash << " (" << outcome.tokens.size() << " prompts)";
}

class Exactness : public testing::Test {
 protected:
  Exactness() { WriteText(prompt_file_, Join(Prompts())); }

  Outcome RunProcesses(int ranks, const Strings& more = {}) {
    return RunProcessesOn(prompt_file_, ranks, more);
  }

  Outcome RunProcessesOn(const std::string& prompt_file, int ranks, const Strings& more = {}) {
    const std::string json = directory_.path("processes.json");
    std::filesystem::remove(json);
    Strings arguments = {"run",
                         "--model",
                         model_,
                         "--prompt-file",
                         prompt_file,
                         "--max-tokens",
                         std::to_string(kMaxTokens),
                         "--json",
                         json};
    if (more.empty() || more[0] != "--wire-combine") {
      arguments.insert(arguments.end(), {"--wire", "exact"});
    }
    arguments.insert(arguments.end(), more.begin(), more.end());
    const CommandResult result = RunTernion(ranks, arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const Json report = ReadJson(json);
    EXPECT_EQ(report.value("ranks", 0), std::max(1, ranks));
    return Outcome(report);
  }

  // The same command on ranks that are threads of this process.
  Outcome RunThreads(int ranks, const RunOptions& prototype) {
    RunOptions options = prototype;
    options.engine.model = model_;
    options.engine.wire = "exact";
    options.engine.world.threads = 1;
    options.max_tokens = kMaxTokens;
    options.json = directory_.path("threads.json");
    std::filesystem::remove(options.json);
    testing::internal::CaptureStdout();
    const std::vector<absl::Status> statuses =
        comm::RunLoopback(ranks, [&](comm::Transport& transport) -> absl::Status {
          auto world = World::CreateOn(&transport, options.engine.world);
          return world.ok() ? launcher::Run(options, **world) : world.status();
        });
    testing::internal::GetCapturedStdout();
    for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
    return Outcome(ReadJson(options.json));
  }

  Outcome RunThreads(int ranks) {
    RunOptions options;
    options.prompt_file = prompt_file_;
    return RunThreads(ranks, options);
  }

  // A placement file whose element e is ranks(e).
  std::string Placement(const std::function<Json(int expert)>& ranks) {
    Json experts = Json::array();
    const int count = ReadJson(model_ + "/config.json")["num_experts"];
    for (int expert = 0; expert < count; ++expert) experts.push_back(ranks(expert));
    const std::string path = directory_.path("placement.json");
    WriteText(path, Json{{"experts", experts}}.dump());
    return path;
  }

  const TempDir directory_;
  std::string model_ = SourcePath("models/tiny");
  const std::string prompt_file_ = directory_.path("prompts.txt");
};

TEST_F(Exactness, AnyNumberOfProcesses) {
  const Outcome alone = RunProcesses(0);
  ASSERT_EQ(alone.tokens.size(), Prompts().size());
  // Different prompts, different logits: else equality would mean nothing.
  EXPECT_EQ(std::set<std::string>(alone.hashes.begin(), alone.hashes.end()).size(),
            alone.hashes.size());
  for (int ranks = 1; ranks <= 4; ++ranks)
    EXPECT_EQ(RunProcesses(ranks), alone) << ranks << " ranks";
}

TEST_F(Exactness, AnyPlacement) {
  const Outcome alone = RunThreads(1);
  for (int ranks = 2; ranks <= 4; ++ranks) {
    SCOPED_TRACE(ranks);
    // Rank 0 holds nothing, the last nearly everything.
    const auto uneven = [&](int expert) -> Json { return expert == 5 ? 1 : ranks - 1; };
    EXPECT_EQ(RunProcesses(ranks, {"--placement", Placement(uneven)}), alone);
    const auto scattered = [&](int expert) -> Json { return expert * 7 % ranks; };
    EXPECT_EQ(RunProcesses(ranks, {"--placement", Placement(scattered)}), alone);
    const auto replicated = [&](int expert) -> Json {
      Json holders = Json::array();
      for (int rank = 0; rank < ranks; ++rank) {
        if (expert % 3 == 0 || expert % ranks == rank) holders.push_back(rank);
      }
      return holders;
    };
    EXPECT_EQ(RunProcesses(ranks, {"--placement", Placement(replicated)}), alone);
  }
}

TEST_F(Exactness, ThreadsAndProcesses) {
  const Outcome processes = RunProcesses(2);
  for (int ranks = 1; ranks <= 4; ++ranks)
    EXPECT_EQ(RunThreads(ranks), processes) << ranks << " ranks";
}

TEST_F(Exactness, AloneOrAmongOthers) {
  const Outcome together = RunThreads(1);
  const Strings prompts = Prompts();
  ASSERT_EQ(together.hashes.size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    RunOptions options;
    options.prompt = prompts[i];
    const Outcome alone = RunThreads(i % 2 == 0 ? 1 : 3, options);
    ASSERT_EQ(alone.tokens.size(), 1u);
    EXPECT_EQ(alone.hashes[0], together.hashes[i]) << prompts[i];
    EXPECT_EQ(alone.tokens[0], together.tokens[i]) << prompts[i];
  }
  const std::string one = directory_.path("one.txt");
  WriteText(one, prompts[13] + "\n");
  EXPECT_EQ(RunProcessesOn(one, 3).hashes[0], together.hashes[13]);
}

// What is sent to experts is what they multiply, so its precision on the wire is free down to the
// model's own.
TEST_F(Exactness, DispatchIsLossless) {
  for (const char* combine : {"bf16", "fp32", "int8"}) {
    SCOPED_TRACE(combine);
    const Strings wire = {"--wire-combine", combine, "--wire-dispatch"};
    Strings narrow = wire, wide = wire;
    narrow.push_back("int8");
    wide.push_back("fp32");
    EXPECT_EQ(RunProcesses(2, narrow), RunProcesses(2, wide));
  }
}

// The a4.8 model: int4 rows, a 3-bit cache.
TEST_F(Exactness, FourBitActivations) {
  const Outcome of_tiny = RunThreads(1);
  model_ = SourcePath("models/tiny-a48");
  const Outcome alone = RunThreads(1);
  EXPECT_NE(alone.hash, of_tiny.hash);
  for (int ranks = 2; ranks <= 4; ++ranks) EXPECT_EQ(RunProcesses(ranks), alone) << ranks;
  const auto with_dispatch = [&](const char* dispatch) {
    return RunProcesses(3, {"--wire-combine", "bf16", "--wire-dispatch", dispatch});
  };
  EXPECT_EQ(with_dispatch("int4"), with_dispatch("fp32"));
}

// The combine does change bits, so the comparisons above can fail.
TEST_F(Exactness, CombineIsNotLossless) {
  EXPECT_NE(RunProcesses(2, {"--wire-combine", "int8"}).hash, RunProcesses(2).hash);
}

}  // namespace
}  // namespace ternion::launcher
