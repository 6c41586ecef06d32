// `--device cuda --transport nccl` on emulated devices and the emulated NCCL: ranks are threads,
// and the bits are those of one rank on the CPU.
#include <nccl.h>

#include <ostream>
#include <string>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "launcher/commands.h"
#include "tests/emulator/emulator.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

struct Case {
  std::string name;
  int ranks = 1;
  int devices = 1;
  std::string exchange = "direct";
  std::string micro_batches = "1";
  std::vector<int> nodes = {};

  friend std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }
};

class RanksOnDevices : public testing::Test {
 protected:
  ~RanksOnDevices() override { emulator::SetDeviceCount(1); }

  RunOptions Options() const {
    RunOptions options;
    options.prompt_file = directory_.path("prompts.txt");
    WriteText(options.prompt_file,
              "Candle, n. 1. A\nThe ship was\nIt was the best of times, it was the worst\n");
    options.engine.model = SourcePath("models/tiny");
    options.engine.world.threads = 1;
    options.max_tokens = 2;
    options.json = directory_.path("report.json");
    return options;
  }

  std::string HashOf(const RunOptions& options, int ranks, const std::vector<int>& nodes) {
    std::filesystem::remove(options.json);
    testing::internal::CaptureStdout();
    const std::vector<absl::Status> statuses = comm::RunLoopback(
        ranks,
        [&](comm::Transport& transport) -> absl::Status {
          auto world = World::CreateOn(&transport, options.engine.world);
          return world.ok() ? launcher::Run(options, **world) : world.status();
        },
        nodes);
    testing::internal::GetCapturedStdout();
    for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
    return ReadJson(options.json).value("logits_hash", "");
  }

  const TempDir directory_;
};

class NcclTransport : public RanksOnDevices, public testing::WithParamInterface<Case> {};

TEST_P(NcclTransport, GivesTheBitsOfMpi) {
  const Case& c = GetParam();
  emulator::SetDeviceCount(c.devices);
  RunOptions options = Options();
  options.engine.exchange = c.exchange;
  options.engine.micro_batches = c.micro_batches;
  if (c.exchange == "direct") options.engine.wire = "exact";
  const std::string cpu = HashOf(options, c.ranks, c.nodes);
  ASSERT_FALSE(cpu.empty());
  const emulator::NcclCounts before = emulator::CountNccl();
  options.engine.world.device = "cuda";
  options.engine.world.transport = "nccl";
  EXPECT_EQ(HashOf(options, c.ranks, c.nodes), cpu);
  const emulator::NcclCounts after = emulator::CountNccl();
  EXPECT_EQ(after.groups > before.groups, c.devices > 1);
  EXPECT_EQ(after.destroyed - before.destroyed, c.devices > 1 ? c.ranks : 0);
  EXPECT_EQ(after.aborted, before.aborted);
}

// A KV cache that nobody gave a size takes a quarter of the rank's share.
TEST_F(RanksOnDevices, ShareMemoryWhereTheyShareADevice) {
  RunOptions options = Options();
  options.engine.world.device = "cuda";
  const auto kv_tokens = [&](int ranks, int devices) {
    emulator::SetDeviceCount(devices);
    HashOf(options, ranks, {});
    return ReadJson(options.json)["per_rank"][ranks - 1]["kv_tokens"].get<int64_t>();
  };
  const int64_t alone = kv_tokens(1, 1);
  EXPECT_EQ(kv_tokens(2, 2), alone);
  EXPECT_EQ(kv_tokens(2, 1), alone / 2);
  EXPECT_EQ(kv_tokens(3, 2), alone / 2);
}

INSTANTIATE_TEST_SUITE_P(
    Exchanges, NcclTransport,
    testing::Values(Case{"OneRank"}, Case{.name = "ThreadsOnOneDevice", .ranks = 2},
                    Case{.name = "TwoRanks", .ranks = 2, .devices = 2},
                    Case{.name = "MicroBatches", .ranks = 3, .devices = 3, .micro_batches = "2"},
                    Case{.name = "Hierarchical",
                         .ranks = 4,
                         .devices = 4,
                         .exchange = "hierarchical",
                         .nodes = {0, 0, 1, 1}}),
    [](const auto& info) { return info.param.name; });

// The command in one process, and in two that have one device between them.
TEST(NcclCommand, NeedsADeviceForEachProcess) {
  const Strings run = {"run",         "--model",      SourcePath("models/tiny"),
                       "--prompt",    "The",          "--device",
                       "cuda",        "--max-tokens", "2",
                       "--transport", "nccl"};
  const CommandResult alone = RunTernion(0, run);
  EXPECT_EQ(alone.exit_code, 0) << alone.err;
  const CommandResult two = RunTernion(2, run);
  EXPECT_NE(two.exit_code, 0);
  EXPECT_FALSE(two.timed_out);
  EXPECT_NE(two.err.find("ranks 0 and 1 share device 0000:01:00.0"), std::string::npos) << two.err;
}

}  // namespace
}  // namespace ternion::launcher
