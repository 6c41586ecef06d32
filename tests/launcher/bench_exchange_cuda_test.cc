// `bench exchange --device cuda` on emulated devices: the sums and the bytes of the CPU. By MPI
// between processes, and by the emulated NCCL between threads.
#include <nccl.h>

#include <string>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "launcher/bench_exchange.h"
#include "tests/emulator/emulator.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

class BenchExchangeCuda : public testing::Test {
 protected:
  ~BenchExchangeCuda() override { emulator::SetDeviceCount(1); }

  const TempDir directory_;
  const std::string json_ = directory_.path("report.json");
};

void ExpectSameExchanges(const Json& cuda, const Json& cpu, const std::string& transport) {
  EXPECT_EQ(cuda["device"], "cuda");
  EXPECT_EQ(cuda["isa"], "cuda");
  EXPECT_EQ(cuda["transport"], transport);
  EXPECT_EQ(cpu["device"], "cpu");
  size_t compared = 0;
  for (const Json& of_cpu : cpu["cases"]) {
    const std::string wire = of_cpu["wire"];
    if (transport == "nccl" && wire.ends_with("alltoallv")) continue;
    SCOPED_TRACE(wire);
    ASSERT_LT(compared, cuda["cases"].size());
    const Json& of_cuda = cuda["cases"][compared++];
    EXPECT_EQ(of_cuda["wire"], wire);
    EXPECT_TRUE(of_cuda["verified"].get<bool>());
    EXPECT_EQ(of_cuda["output_hash"], of_cpu["output_hash"]);
    // The network's own counters see other processes.
    for (const char* bytes : {"payload_bytes", "message_bytes", "inter_node_bytes",
                              "bottleneck_link_bytes", "remote_ranks"}) {
      EXPECT_EQ(of_cuda["per_token_and_layer"][bytes], of_cpu["per_token_and_layer"][bytes])
          << bytes;
    }
  }
  EXPECT_GE(compared, 12u);
  EXPECT_EQ(compared, cuda["cases"].size());
}

// ---- Processes

Strings Command(const std::string& device, const std::string& json) {
  return {"bench",    "exchange", "--hidden",  "160", "--experts", "8",  "--top-k",  "2",
          "--tokens", "3,70",     "--seconds", "0",   "--json",    json, "--device", device};
}

TEST_F(BenchExchangeCuda, AProcessAlone) {
  ASSERT_EQ(RunTernion(0, Command("cpu", json_)).exit_code, 0);
  const Json cpu = ReadJson(json_);
  const CommandResult result = RunTernion(0, Command("cuda", json_));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  ExpectSameExchanges(ReadJson(json_), cpu, "none");
}

TEST_F(BenchExchangeCuda, ProcessesThatShareADevice) {
  ASSERT_EQ(RunTernion(3, Command("cpu", json_)).exit_code, 0);
  const Json cpu = ReadJson(json_);
  const CommandResult result = RunTernion(3, Command("cuda", json_));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("# device cuda, transport mpi"), std::string::npos) << result.out;
  ExpectSameExchanges(ReadJson(json_), cpu, "mpi");
}

TEST_F(BenchExchangeCuda, RefusesMoreThanTheDeviceHolds) {
  const CommandResult result = RunTernion(
      0, {"bench", "exchange", "--shape", "deepseek-v3", "--tokens", "4000", "--device", "cuda"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_NE(result.err.find("its device has 268.4 MB"), std::string::npos) << result.err;
}

// ---- Threads, each with a device

Json ReportOfThreads(BenchExchangeOptions options, const std::vector<int>& nodes) {
  testing::internal::CaptureStdout();
  const std::vector<absl::Status> statuses = comm::RunLoopback(
      static_cast<int>(nodes.size()),
      [&](comm::Transport& transport) -> absl::Status {
        auto world = World::CreateOn(&transport, options.world);
        return world.ok() ? BenchExchange(options, **world) : world.status();
      },
      nodes);
  testing::internal::GetCapturedStdout();
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  return ReadJson(options.json);
}

class BenchExchangeNccl : public BenchExchangeCuda,
                          public testing::WithParamInterface<std::vector<int>> {};

TEST_P(BenchExchangeNccl, GivesTheSumsOfMpi) {
  BenchExchangeOptions options;
  options.world.threads = 1;
  options.hidden = 160;
  options.experts = 8;
  options.top_k = 2;
  options.tokens = {3};
  options.seconds = 0;
  options.json = json_;
  const Json cpu = ReportOfThreads(options, GetParam());
  emulator::SetDeviceCount(static_cast<int>(GetParam().size()));
  options.world.device = "cuda";
  options.world.transport = "nccl";
  const emulator::NcclCounts before = emulator::CountNccl();
  ExpectSameExchanges(ReportOfThreads(options, GetParam()), cpu, "nccl");
  EXPECT_GT(emulator::CountNccl().groups, before.groups);
}

INSTANTIATE_TEST_SUITE_P(Nodes, BenchExchangeNccl,
                         testing::Values(std::vector<int>{0, 0, 0}, std::vector<int>{0, 0, 1, 1}),
                         [](const auto& info) {
                           return info.param.size() == 3 ? "ThreeRanks" : "Hierarchical";
                         });

}  // namespace
}  // namespace ternion::launcher
