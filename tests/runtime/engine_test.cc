// Whole worlds of ranks on the bundled model: N ranks give what one rank gives.

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/status.h"
#include "comm/loopback/loopback.h"
#include "experts/trace.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/comm/faulty_transport.h"
#include "tests/runtime/engine_support.h"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsInvalid;
using Json = nlohmann::json;

// Placement files for `num_ranks` ranks: uneven, a rank without experts, replicas.
std::vector<std::string> WritePlacements(const test::TempDir& directory, int num_ranks) {
  const int last = num_ranks - 1;
  const auto odd_on_last = [&](int expert) { return Json(expert % 2 == 1 ? last : 0); };
  const auto all_on_last = [&](int) { return Json(last); };
  const auto replicated = [&](int expert) {
    Json ranks = Json::array({expert % num_ranks});
    if (num_ranks > 1) ranks.push_back((expert + 1) % num_ranks);
    return ranks;
  };
  return {"contiguous", directory.Write("odd.json", PlacementJson(odd_on_last)),
          directory.Write("last.json", PlacementJson(all_on_last)),
          directory.Write("replicated.json", PlacementJson(replicated))};
}

TEST(Engine, AnyNumberOfRanksAndAnyPlacementGiveTheSameBits) {
  const std::vector<Request> requests = ManyPrompts();
  const std::vector<Outcome> expected = Generate({.num_ranks = 1}, requests);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(expected[i].tokens.size(), static_cast<size_t>(requests[i].max_new_tokens));
    EXPECT_EQ(expected[i].finish, FinishReason::kLength);
    for (size_t j = 0; j < i; ++j) EXPECT_NE(expected[i].logits_hash, expected[j].logits_hash);
  }
  for (int num_ranks = 1; num_ranks <= 4; ++num_ranks) {
    test::TempDir directory;
    for (const std::string& placement : WritePlacements(directory, num_ranks)) {
      SCOPED_TRACE(std::to_string(num_ranks) + " ranks, " + placement);
      EXPECT_EQ(Generate({.num_ranks = num_ranks, .placement = placement}, requests), expected);
    }
  }
}

TEST(Engine, PlacementsFromATraceGiveTheSameBits) {
  const std::vector<Request> requests = ManyPrompts();
  const std::vector<Outcome> expected = Generate({.num_ranks = 1}, requests);
  test::TempDir directory;
  const std::string trace = directory.path("trace.bin");
  ASSERT_TRUE(experts::SaveTrace(*experts::ZipfTrace(1, 1, kTraceShape), trace).ok());
  for (const std::string placement : {"balanced", "local"}) {
    for (const int num_ranks : {1, 3}) {
      SCOPED_TRACE(std::to_string(num_ranks) + " ranks, " + placement);
      EXPECT_EQ(
          Generate({.num_ranks = num_ranks, .placement = placement, .trace = trace}, requests),
          expected);
    }
  }
}

TEST(Engine, CompanyDoesNotChangeASequence) {
  const std::vector<Request> requests = ManyPrompts();
  const std::vector<Outcome> together = Generate({.num_ranks = 3}, requests);
  for (const size_t alone : {0, 5, 9}) {
    for (const int num_ranks : {1, 3}) {
      EXPECT_EQ(Generate({.num_ranks = num_ranks}, {requests[alone]}),
                std::vector<Outcome>({together[alone]}));
    }
  }
}

TEST(Engine, ChunkedPrefillGivesTheSameBits) {
  // Longer than a KV page, and through it in pieces that do not divide it.
  std::vector<Request> requests = {RandomPrompt(150, 6, 1), RandomPrompt(40, 12, 2)};
  requests.push_back(RandomPrompt(140, 0, 3));
  requests.back().score = true;
  const std::vector<Outcome> expected = Generate({.max_rows = 512}, requests);
  EXPECT_GT(expected[2].nll, 0);
  for (const int64_t max_rows : {3, 7, 64}) {
    const std::vector<Outcome> chunked = Generate({.num_ranks = 2, .max_rows = max_rows}, requests);
    ASSERT_EQ(chunked.size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(chunked[i].tokens, expected[i].tokens);
      EXPECT_EQ(chunked[i].logits_hash, expected[i].logits_hash);
      EXPECT_NEAR(chunked[i].nll, expected[i].nll, 1e-9 * expected[i].nll);  // sums of sums
    }
  }
}

TEST(Engine, SampledTokensDoNotDependOnTheWorld) {
  std::vector<Request> requests = ManyPrompts();
  for (Request& request : requests) {
    request.sampling = {
        .temperature = 1, .top_k = 50, .top_p = 0.9f, .seed = request.prompt.size()};
  }
  const std::vector<Outcome> expected = Generate({.num_ranks = 1}, requests);
  EXPECT_EQ(Generate({.num_ranks = 3, .max_rows = 16}, requests), expected);
  EXPECT_NE(Generate({.num_ranks = 1}, ManyPrompts()), expected);
}

TEST(Engine, PromptsOfOneToken) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 5; ++i) requests.push_back(RandomPrompt(1, 5, i));
  EXPECT_EQ(Generate({.num_ranks = 4}, requests), Generate({.num_ranks = 1}, requests));
}

TEST(Engine, StopsAtAStopId) {
  Request request = RandomPrompt(20, 8, 1);
  const Outcome free = Generate({}, {request})[0];
  request.stop_ids = {free.tokens[3]};
  const Outcome stopped = Generate({.num_ranks = 2}, {request})[0];
  const size_t first =
      std::find(free.tokens.begin(), free.tokens.end(), free.tokens[3]) - free.tokens.begin();
  EXPECT_EQ(stopped.finish, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens,
            std::vector<int32_t>(free.tokens.begin(), free.tokens.begin() + first + 1));
}

TEST(Engine, WhatIsTooLongIsRefusedAndTheRestRuns) {
  const auto statuses =
      RunEngines({.num_ranks = 2, .kv_tokens = 256}, [&](Engine& engine) -> absl::Status {
        EXPECT_EQ(engine.kv_tokens(), 256);
        EXPECT_TRUE(IsInvalid(engine.Submit(RandomPrompt(257, 1, 1)).status(), "a rank has 256"));
        EXPECT_TRUE(IsInvalid(engine.Submit(RandomPrompt(250, 7, 1)).status(), "a rank has 256"));
        EXPECT_TRUE(IsInvalid(engine.Submit(RandomPrompt(513, 1, 1)).status(), "512 positions"));
        EXPECT_TRUE(IsInvalid(engine.Submit(RandomPrompt(0, 1, 1)).status(), "empty"));
        Request beyond = RandomPrompt(3, 1, 1);
        beyond.prompt[1] = kVocab;
        EXPECT_TRUE(IsInvalid(engine.Submit(beyond).status(), "token id 4096"));
        TERNION_RETURN_IF_ERROR(engine.Submit(RandomPrompt(252, 4, 1)).status());
        std::map<SequenceId, Outcome> outcomes;
        TERNION_RETURN_IF_ERROR(RunToEnd(engine, outcomes));
        EXPECT_EQ(outcomes.size(), 1u);
        EXPECT_EQ(outcomes.begin()->second.tokens.size(), 4u);
        return absl::OkStatus();
      });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(Engine, MoreSequencesThanFitAllFinish) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 12; ++i) requests.push_back(RandomPrompt(100 + i * 3, 3, i));
  const std::vector<Outcome> expected = Generate({.max_rows = 512, .kv_tokens = 4096}, requests);
  // One or two at a time.
  EXPECT_EQ(Generate({.num_ranks = 1, .kv_tokens = 256}, requests), expected);
  EXPECT_EQ(Generate({.num_ranks = 2, .kv_tokens = 128}, {requests.begin(), requests.begin() + 9}),
            std::vector<Outcome>(expected.begin(), expected.begin() + 9));
}

TEST(Engine, IdleStepsAndLaterRequests) {
  const Request request = RandomPrompt(10, 4, 1);
  const Outcome expected = Generate({}, {request})[0];
  std::map<SequenceId, Outcome> outcomes;
  const auto statuses = RunEngines({.num_ranks = 2}, [&](Engine& engine) -> absl::Status {
    for (int round = 0; round < 3; ++round) {
      TERNION_ASSIGN_OR_RETURN(const StepReport idle, engine.Step());
      EXPECT_TRUE(idle.events.empty());
      TERNION_RETURN_IF_ERROR(engine.Submit(request).status());
      TERNION_RETURN_IF_ERROR(RunToEnd(engine, outcomes));
    }
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  ASSERT_EQ(outcomes.size(), 3u);
  for (const auto& [id, outcome] : outcomes) EXPECT_EQ(outcome, expected);
}

// Which rows travel together is nobody's business: the same bits on every wire, also where a prompt
// is cut in the middle and where ranks have no rows.
TEST(Engine, MicroBatchesChangeNothing) {
  std::vector<Request> requests = ManyPrompts();
  requests.resize(5);
  for (const WireOptions& wire : {kExact, WireOptions{.combine = comm::RowFormat::kInt4}}) {
    for (int num_ranks = 1; num_ranks <= 4; ++num_ranks) {
      WorldCase c = {.num_ranks = num_ranks, .wire = wire, .max_rows = 33};
      const std::vector<Outcome> expected = Generate(c, requests);
      c.micro_batches = 2;
      EXPECT_EQ(Generate(c, requests), expected) << num_ranks << " ranks";
    }
  }
}

// A rank that has to wait for whatever it receives.
class SlowTransport : public comm::FaultyTransport {
 public:
  using FaultyTransport::FaultyTransport;
  absl::StatusOr<comm::Arrival> Receive(std::span<const comm::Awaited> awaited) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return FaultyTransport::Receive(awaited);
  }
};

// Where rank 0 waits much, some steps go in halves and some do not.
TEST(Engine, ChosenMicroBatchesChangeNothing) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 20; ++i) requests.push_back(RandomPrompt(3, 14, i));
  const std::vector<Outcome> expected = Generate({.num_ranks = 1}, requests);
  std::map<SequenceId, Outcome> outcomes;
  std::set<int> chosen;
  const auto statuses = comm::RunLoopback(2, [&](comm::Transport& world) -> absl::Status {
    SlowTransport slow(&world);
    const bool is_root = world.rank() == RankId{0};
    base::ThreadPool threads(1);
    kernels::Executor executor{.threads = &threads};
    TERNION_ASSIGN_OR_RETURN(
        const std::unique_ptr<Engine> engine,
        MakeEngine({.num_ranks = 2, .micro_batches = 0}, is_root ? slow : world, executor));
    if (!is_root) return engine->Follow();
    for (const Request& request : requests) {
      TERNION_RETURN_IF_ERROR(engine->Submit(request).status());
    }
    TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes, &chosen));
    return engine->Stop();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(chosen, (std::set<int>{1, 2}));
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(outcomes[SequenceId{static_cast<int32_t>(i)}], expected[i]);
  }
}

// Two hops in place of one: the same in each run and in halves, and close to the direct way, since
// only sums are rounded otherwise.
TEST(Engine, HierarchicalExchange) {
  std::vector<Request> requests = ManyPrompts();
  requests.resize(5);
  for (Request& request : requests) request.max_new_tokens = 2;
  WorldCase c = {.num_ranks = 4, .wire = {.combine = comm::RowFormat::kInt8}, .max_rows = 33};
  const std::vector<Outcome> direct = Generate(c, requests);
  c.hierarchical = true;
  EXPECT_EQ(Generate(c, requests).size(), direct.size()) << "one node";
  c.node_of = {0, 1, 0, 1};
  const std::vector<Outcome> expected = Generate(c, requests);
  EXPECT_NE(expected, direct) << "sums are rounded elsewhere";
  EXPECT_EQ(Generate(c, requests), expected);
  c.micro_batches = 2;
  EXPECT_EQ(Generate(c, requests), expected);
}

}  // namespace
}  // namespace ternion::runtime
