// The virtual cluster: its command, the built `ternion` across its hosts, and hosts that get lost.
// Needs root and a kernel that lets us make network namespaces; is skipped without.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <sstream>

#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

using std::chrono::seconds;

std::string Name(const std::string& suffix = "") {
  return "ternion-test-" + std::to_string(getpid()) + suffix;
}

Strings Cluster(Strings arguments) {
  arguments.insert(arguments.begin(), SourcePath("cluster/virtual/cluster"));
  return arguments;
}

CommandOptions Named(const std::string& name) {
  return {.environment = {{"TERNION_CLUSTER", name}}, .time_limit = seconds(120)};
}

CommandResult RunCluster(const Strings& arguments, const std::string& name = Name()) {
  return RunCommand(Cluster(arguments), Named(name));
}

void Expect(const Strings& arguments) {
  const CommandResult result = RunCluster(arguments);
  EXPECT_EQ(result.exit_code, 0) << arguments[0] << ": " << result.err;
}

// What this machine has that a cluster of this test is made of, or could have leaked.
std::set<std::string> Traces() {
  std::set<std::string> traces;
  for (const Strings& command : {Strings{"ip", "netns", "list"}, {"ls", "/etc/netns"}}) {
    for (const std::string& line : LinesThatStartWith(RunCommand(command).out, Name())) {
      traces.insert(line);
    }
  }
  const std::string links = RunCommand({"ip", "-brief", "link"}).out;
  for (const char* link : {"h0", "h1", "h2", "br0", "eth0@"}) {
    for (const std::string& line : LinesThatStartWith(links, link)) traces.insert(line);
  }
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const pid_t pid = std::atoi(entry.path().filename().c_str());
    if (pid > 0 && EnvironmentOf(pid, "TERNION_CLUSTER").starts_with(Name())) {
      traces.insert("process " + ReadText(entry.path() / "cmdline"));
    }
  }
  return traces;
}

size_t NumNamespaces() {
  return LinesThatStartWith(RunCommand({"ip", "netns", "list"}).out, Name()).size();
}

// Processes of this test's cluster that run `ternion`.
int NumRanks() {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const pid_t pid = std::atoi(entry.path().filename().c_str());
    count += pid > 0 && ReadText(entry.path() / "comm") == "ternion\n" &&
             EnvironmentOf(pid, "TERNION_CLUSTER").starts_with(Name());
  }
  return count;
}

class VirtualCluster : public testing::Test {
 protected:
  void SetUp() override {
    const CommandResult result = RunCluster({"up", "1"});
    // Where there can be none; any other failure is one of the script.
    for (const char* why : {"needs root", "no network namespaces here"}) {
      if (result.err.find(why) != std::string::npos) GTEST_SKIP() << result.err;
    }
    ASSERT_EQ(result.exit_code, 0) << result.err;
    Expect({"down"});
    before_ = Traces();
  }

  void TearDown() override {
    if (IsSkipped()) return;
    Expect({"down"});
    EXPECT_EQ(Traces(), before_) << "down leaves nothing";
  }

  // A job that takes far longer than any test waits, over all hosts.
  Strings LongJob(int ranks) {
    const std::string config = directory_.path("config.json");
    WriteText(config, R"({"model_type": "bitnet_moe", "vocab_size": 300, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32, "hidden_act": "silu",
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "max_position_embeddings": 200000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true})");
    const std::string model = directory_.path("model");
    EXPECT_EQ(RunTernion(0, {"synth", "--config", config, "--out", model}).exit_code, 0);
    return Cluster({"run", "-n", std::to_string(ranks), TERNION_COMMAND, "run", "--model", model,
                    "--prompt", "x", "--max-tokens", "190000"});
  }

  static int64_t BytesSentBy(const std::string& host) {
    return std::stoll(
        RunCluster({"exec", host, "cat /sys/class/net/eth0/statistics/tx_bytes"}).out);
  }

  const TempDir directory_;
  std::set<std::string> before_;
};

// With --wire exact; also in halves, and with two ranks on some of the hosts.
TEST_F(VirtualCluster, AnyNumberOfHostsGivesTheLogitsOfOneRank) {
  const std::string prompts = directory_.path("prompts.txt");
  WriteText(prompts,
            "Candle, n. 1\nA\nThe ship was lost in the storm, and of all its men\n1.\nHe\n");
  const auto run = [&](const std::string& ranks, const std::string& micro_batches) {
    const std::string json = directory_.path("run.json");
    Expect({"run", "-n", ranks, TERNION_COMMAND, "run", "--model", SourcePath("models/tiny"),
            "--wire", "exact", "--prompt-file", prompts, "--max-tokens", "12", "--micro-batches",
            micro_batches, "--json", json});
    return ReadJson(json);
  };
  Expect({"up", "7", "--rate", "1gbit"});
  const Json alone = run("1", "auto");
  ASSERT_TRUE(alone.is_object());
  for (const char* ranks : {"2", "3", "4", "7", "9"}) {
    SCOPED_TRACE(ranks);
    const int64_t sent_before = BytesSentBy("h1");
    const Json across = run(ranks, ranks == std::string("4") ? "2" : "auto");
    const int64_t sent = BytesSentBy("h1") - sent_before;
    ASSERT_TRUE(across.is_object());
    const int64_t num_ranks = across["ranks"];
    EXPECT_EQ(std::to_string(num_ranks), ranks);
    EXPECT_EQ(across["logits_hash"], alone["logits_hash"]);
    int64_t message_bytes = 0;
    for (const char* phase : {"dispatch", "combine"}) {
      const Json& traffic = across["traffic"][phase];
      EXPECT_EQ(traffic["intra_node"]["messages"] > 0, num_ranks > 7);
      message_bytes += traffic["inter_node"]["message_bytes"].get<int64_t>();
    }
    EXPECT_GT(sent, message_bytes / (2 * num_ranks)) << "host 1's part of what all sent";
  }
}

TEST_F(VirtualCluster, HostsDifferInNameAddressAndNode) {
  Expect({"up", "3"});
  EXPECT_EQ(RunCluster({"exec", "h2", "hostname; grep -c ' h' /etc/hosts"}).out, "h2\n3\n");
  CommandResult result = RunCluster({"run", "hostname"});
  std::istringstream words(result.out);
  std::multiset<std::string> names{std::istream_iterator<std::string>(words), {}};
  EXPECT_EQ(names, (std::multiset<std::string>{"h0", "h1", "h2"})) << result.err;
  EXPECT_EQ(RunCluster({"exec", "h1", "exit 7"}).exit_code, 7);
}

TEST_F(VirtualCluster, ACutHostIsAnErrorThatNamesIt) {
  Expect({"up", "4"});
  Child job(LongJob(4), Named(Name()));
  ASSERT_TRUE(job.WaitForOutput(100)) << "it generates";
  const auto start = std::chrono::steady_clock::now();
  Expect({"cut", "h2"});
  const CommandResult result = job.Wait();
  EXPECT_FALSE(result.timed_out);
  EXPECT_NE(result.exit_code, 0);
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(20));
  for (const char* rank : {"0", "1", "3"}) {
    const std::string said =
        std::string("ternion: error: rank ") + rank + ": rank 2 (host h2) is gone";
    EXPECT_NE(result.err.find(said), std::string::npos) << rank << "\n" << result.err;
  }
  Expect({"heal", "h2"});
  const CommandResult again = RunCluster({"run", "-n", "4", "hostname"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
}

// Host 0 holds mpirun: the others are cut off from it.
TEST_F(VirtualCluster, ACutFirstHostEndsTheJobToo) {
  Expect({"up", "3"});
  Child job(LongJob(3), Named(Name()));
  ASSERT_TRUE(job.WaitForOutput(100));
  ASSERT_EQ(NumRanks(), 3);
  const auto start = std::chrono::steady_clock::now();
  Expect({"cut", "h0"});
  const CommandResult result = job.Wait();
  EXPECT_FALSE(result.timed_out);
  EXPECT_NE(result.exit_code, 0);
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(20));
  EXPECT_NE(result.err.find("ternion: error: rank 0: rank "), std::string::npos) << result.err;
  // Nobody is left to tell the others' words, but they end as well.
  while (NumRanks() > 0 && std::chrono::steady_clock::now() - start < seconds(20)) {
  }
  EXPECT_EQ(NumRanks(), 0);
}

TEST_F(VirtualCluster, AKilledMpirunLeavesNothing) {
  Expect({"up", "3"});
  Child job(LongJob(3), Named(Name()));
  ASSERT_TRUE(job.WaitForOutput(100));
  ASSERT_NE(ReadText("/proc/" + std::to_string(job.pid()) + "/cmdline").find("mpirun"),
            std::string::npos);
  kill(job.pid(), SIGKILL);
  job.Wait();  // TearDown: nothing is left after down
}

TEST_F(VirtualCluster, ACrashInTheMiddleOfUp) {
  for (const Strings& next : {Strings{"down"}, Strings{"up", "2"}}) {
    SCOPED_TRACE(next[0]);
    Child up(Cluster({"up", "100"}), Named(Name()));
    while (NumNamespaces() < 5) ASSERT_EQ(kill(up.pid(), 0), 0);
    kill(up.pid(), SIGKILL);
    up.Wait();
    ASSERT_LT(NumNamespaces(), 100u) << "it was in the middle";
    EXPECT_NE(RunCluster({"run", "hostname"}).exit_code, 0) << "half a cluster is none";
    Expect(next);
    EXPECT_EQ(NumNamespaces(), next[0] == "down" ? 0u : 3u);
  }
  EXPECT_EQ(RunCluster({"run", "hostname"}).exit_code, 0);
}

TEST_F(VirtualCluster, RatesAndLinksChangeWhileItIsUp) {
  const auto status_has = [](const std::string& text) {
    return RunCluster({"status"}).out.find(text) != std::string::npos;
  };
  EXPECT_TRUE(status_has(": down"));
  Expect({"up", "2", "--rate", "250mbit"});
  EXPECT_TRUE(status_has("h1  10.66.0.2  rate 250Mbit  link whole"));
  Expect({"rate", "none"});
  EXPECT_TRUE(status_has("h1  10.66.0.2  rate none  link whole"));
  for (int twice = 0; twice < 2; ++twice) {
    Expect({"cut", "h1"});
    EXPECT_TRUE(status_has("h0  10.66.0.1  rate none  link whole"));
    EXPECT_TRUE(status_has("h1  10.66.0.2  rate none  link cut"));
  }
  for (int twice = 0; twice < 2; ++twice) {
    Expect({"heal", "h1"});
    EXPECT_FALSE(status_has("cut"));
  }
}

TEST_F(VirtualCluster, ClustersOfTwoNamesStandBesideEachOther) {
  Expect({"up", "2"});
  EXPECT_EQ(RunCluster({"up", "1"}, Name("-b")).exit_code, 0);
  EXPECT_EQ(RunCluster({"exec", "h0", "hostname"}, Name("-b")).out, "h0\n");
  EXPECT_EQ(RunCluster({"down"}, Name("-b")).exit_code, 0);
  EXPECT_EQ(RunCluster({"exec", "h1", "hostname"}).out, "h1\n");
}

TEST_F(VirtualCluster, BadUseIsOneClearLine) {
  const struct {
    Strings arguments;
    std::string error;
    bool while_up = false;
  } cases[] = {
      {{}, "'' is not a command"},
      {{"start"}, "'start' is not a command"},
      {{"up"}, "'up' takes 1 argument"},
      {{"up", "0"}, "'0' hosts"},
      {{"up", "three"}, "'three' hosts"},
      {{"up", "201"}, "'201' hosts"},
      {{"up", "2", "--rate"}, "'up' takes 1 argument"},
      {{"up", "2", "--rate", "fast"}, "rate 'fast'"},
      {{"run", "hostname"}, "no cluster '" + Name() + "' is up"},
      {{"cut", "h0"}, "no cluster"},
      {{"rate", "1gbit"}, "no cluster"},
      {{"up", "2"}, "up already, with 2 hosts", true},
      {{"cut", "h2"}, "no host 'h2' (there are: h0 h1)", true},
      {{"heal", "switch"}, "no host 'switch'", true},
      {{"exec", "-x", "true"}, "no host '-x'", true},
      {{"exec", "h0"}, "'exec' takes a host and a command", true},
      {{"rate", "-1gbit"}, "rate '-1gbit'", true},
  };
  for (bool while_up : {false, true}) {
    if (while_up) Expect({"up", "2"});
    const std::set<std::string> before = Traces();
    for (const auto& c : cases) {
      if (c.while_up != while_up) continue;
      const CommandResult result = RunCluster(c.arguments);
      SCOPED_TRACE(result.err);
      EXPECT_EQ(result.exit_code, 1);
      EXPECT_TRUE(result.err.starts_with("cluster: error: "));
      EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1);
      EXPECT_NE(result.err.find(c.error), std::string::npos) << "wanted: " << c.error;
      EXPECT_EQ(Traces(), before) << "nothing is changed";
    }
  }
  // A PATH without tc.
  for (const char* tool : {"bash", "readlink", "cksum", "cut", "id", "ip", "mpirun", "cat"}) {
    const CommandResult found = RunCommand({"sh", "-c", std::string("command -v ") + tool});
    std::filesystem::create_symlink(found.out.substr(0, found.out.find('\n')),
                                    directory_.path(tool));
  }
  CommandOptions without_tc = Named(Name("-c"));
  without_tc.environment["PATH"] = directory_.path();
  const CommandResult lacking = RunCommand(Cluster({"up", "2"}), without_tc);
  EXPECT_EQ(lacking.exit_code, 1);
  EXPECT_EQ(lacking.err, "cluster: error: 'tc' is missing (Debian: iproute2, openmpi-bin)\n");
  for (const Strings& prefix : {Strings{"setpriv", "--reuid=65534", "--clear-groups"},
                                Strings{"unshare", "--user", "--map-root-user"}}) {
    Strings command = prefix;
    for (const std::string& word : Cluster({"up", "2"})) command.push_back(word);
    const CommandResult result = RunCommand(command, Named(Name("-c")));
    SCOPED_TRACE(result.err);
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_TRUE(result.err.starts_with("cluster: error: "));
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1);
  }
}

}  // namespace
}  // namespace ternion::launcher
