// How a job ends when something outside ends it: a killed rank, an interrupt, a reader that has
// gone.
#include <signal.h>

#include <string>

#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

// A model that never stops, and a job that takes far longer than any test waits.
class Lifecycle : public testing::Test {
 protected:
  Lifecycle() {
    const std::string config = directory_.path("config.json");
    WriteText(config, R"({"model_type": "bitnet_moe", "vocab_size": 300, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32, "hidden_act": "silu",
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "max_position_embeddings": 200000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true})");
    const CommandResult made = RunTernion(0, {"synth", "--config", config, "--out", model_});
    EXPECT_EQ(made.exit_code, 0) << made.err;
  }

  Strings LongJob(int ranks) const {
    return Ternion(ranks, {"run", "--model", model_, "--prompt", "x", "--max-tokens", "190000",
                           "--json", json_});
  }

  // The rank's process id among the descendants of `job`, -1 if there is none.
  static pid_t PidOfRank(const Child& job, int rank) {
    for (pid_t pid : DescendantsOf(job.pid())) {
      if (EnvironmentOf(pid, "OMPI_COMM_WORLD_RANK") == std::to_string(rank)) return pid;
    }
    return -1;
  }

  const TempDir directory_;
  const std::string model_ = directory_.path("model");
  const std::string json_ = directory_.path("out.json");
};

TEST_F(Lifecycle, AKilledRankEndsAll) {
  for (int rank : {0, 2}) {
    SCOPED_TRACE(rank);
    Child job(LongJob(3), {.time_limit = std::chrono::seconds(60)});
    ASSERT_TRUE(job.WaitForOutput(100)) << "it generates";
    const std::vector<pid_t> processes = DescendantsOf(job.pid());
    const pid_t victim = PidOfRank(job, rank);
    ASSERT_GT(victim, 0);
    const auto start = std::chrono::steady_clock::now();
    kill(victim, SIGKILL);
    const CommandResult result = job.Wait();
    EXPECT_FALSE(result.timed_out);
    EXPECT_NE(result.exit_code, 0);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
    for (pid_t pid : processes) {
      EXPECT_EQ(EnvironmentOf(pid, "OMPI_COMM_WORLD_RANK"), "") << pid << " still runs";
    }
    EXPECT_FALSE(std::filesystem::exists(json_));
  }
}

TEST_F(Lifecycle, AnInterruptEndsAll) {
  for (int ranks : {0, 3}) {
    SCOPED_TRACE(ranks);
    Child job(LongJob(ranks), {.time_limit = std::chrono::seconds(60)});
    ASSERT_TRUE(job.WaitForOutput(100));
    kill(job.pid(), SIGINT);
    const CommandResult result = job.Wait();
    EXPECT_FALSE(result.timed_out);
    EXPECT_NE(result.exit_code, 0);
    EXPECT_EQ(directory_.num_entries(), 2) << "the model and its config";
  }
}

TEST_F(Lifecycle, AClosedPipeEndsTheJob) {
  for (int ranks : {0, 2}) {
    SCOPED_TRACE(ranks);
    const CommandResult result =
        RunCommand(LongJob(ranks), {.close_output = true, .time_limit = std::chrono::seconds(60)});
    EXPECT_FALSE(result.timed_out);
    EXPECT_NE(result.exit_code, 0);
  }
}

}  // namespace
}  // namespace ternion::launcher
