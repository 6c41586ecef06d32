// Whole worlds of ranks on the bundled model: N ranks give what one rank gives.
#include "runtime/engine.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "comm/loopback/loopback.h"
#include "experts/trace.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "nlohmann/json.hpp"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsError;
using test::IsInvalid;
using Json = nlohmann::json;

constexpr char kModel[] = TERNION_SOURCE_DIR "/models/tiny";
constexpr char kModelA48[] = TERNION_SOURCE_DIR "/models/tiny-a48";
constexpr int kExperts = 16;
constexpr int32_t kVocab = 4096;

constexpr WireOptions kExact = {.exact = true};

struct WorldCase {
  int num_ranks = 1;
  std::string placement = "contiguous";
  WireOptions wire = kExact;
  int64_t max_rows = 64;
  int64_t kv_tokens = 4096;
  std::optional<kernels::KvFormat> kv = std::nullopt;
  std::string model = kModel;
  int micro_batches = 1;
  std::string trace = "";
  bool hierarchical = false;
  std::vector<int> node_of = {};  // [rank]; empty: one node
};

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const WorldCase& c, comm::Transport& transport,
                                                   kernels::Executor& executor) {
  EngineOptions options;
  options.model_directory = c.model;
  options.placement = c.placement;
  options.trace = c.trace;
  options.wire = c.wire;
  options.max_rows = c.max_rows;
  options.kv_tokens = c.kv_tokens;
  options.kv = c.kv;
  options.micro_batches = c.micro_batches;
  options.hierarchical = c.hierarchical;
  return Engine::Create(options, {&transport, kernels::SelectCpuKernels(""), &executor}, nullptr);
}

// Runs `drive` with rank 0's engine; the others follow.
std::vector<absl::Status> RunEngines(const WorldCase& c,
                                     const std::function<absl::Status(Engine&)>& drive) {
  return comm::RunLoopback(
      c.num_ranks,
      [&](comm::Transport& transport) -> absl::Status {
        const bool is_root = transport.rank() == RankId{0};
        // Ranks with different numbers of threads.
        base::ThreadPool threads(1 + base::Index(transport.rank()) % 2);
        kernels::Executor executor{.threads = &threads};
        TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                                 MakeEngine(c, transport, executor));
        if (!is_root) return engine->Follow();
        TERNION_RETURN_IF_ERROR(drive(*engine));
        return engine->Stop();
      },
      c.node_of);
}

// What came of one request.
struct Outcome {
  std::vector<int32_t> tokens;
  uint64_t logits_hash = 0;
  double nll = 0;
  FinishReason finish = FinishReason::kNone;

  bool operator==(const Outcome&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  out << "hash " << outcome.logits_hash << ", tokens";
  for (int32_t token : outcome.tokens) out << ' ' << token;
  return out;
}

absl::Status RunToEnd(Engine& engine, std::map<SequenceId, Outcome>& outcomes) {
  for (int step = 0; !engine.idle(); ++step) {
    if (step > 10000) return absl::InternalError("it never ends");
    TERNION_ASSIGN_OR_RETURN(const StepReport report, engine.Step());
    for (const SequenceEvent& event : report.events) {
      Outcome& outcome = outcomes[event.sequence];
      if (event.token >= 0) outcome.tokens.push_back(event.token);
      outcome.logits_hash = event.logits_hash;
      outcome.nll += event.nll;
      outcome.finish = event.finish;
    }
  }
  return absl::OkStatus();
}

// The outcomes of all requests, submitted together, in their order.
std::vector<Outcome> Generate(const WorldCase& c, const std::vector<Request>& requests) {
  std::map<SequenceId, Outcome> outcomes;
  const auto statuses = RunEngines(c, [&](Engine& engine) -> absl::Status {
    for (const Request& request : requests) {
      TERNION_RETURN_IF_ERROR(engine.Submit(request).status());
    }
    return RunToEnd(engine, outcomes);
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  std::vector<Outcome> list;
  for (auto& [id, outcome] : outcomes) list.push_back(std::move(outcome));
  EXPECT_EQ(list.size(), requests.size());
  return list;
}

Request RandomPrompt(size_t size, int32_t max_new_tokens, uint32_t seed) {
  std::mt19937 random(seed);
  Request request;
  request.max_new_tokens = max_new_tokens;
  for (size_t i = 0; i < size; ++i) request.prompt.push_back(random() % kVocab);
  return request;
}

// Sixteen prompts of 1 to 60 tokens; the first is of 23.
std::vector<Request> ManyPrompts() {
  std::vector<Request> requests = {RandomPrompt(23, 8, 1)};
  for (uint32_t i = 1; i < 16; ++i) {
    requests.push_back(RandomPrompt(i == 5 ? 1 : 1 + i * 37 % 60, 4 + i % 5, 100 + i));
  }
  return requests;
}

std::string PlacementJson(const std::function<Json(int)>& ranks_of) {
  Json experts = Json::array();
  for (int expert = 0; expert < kExperts; ++expert) experts.push_back(ranks_of(expert));
  return Json{{"experts", experts}}.dump();
}

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

constexpr experts::TraceShape kTraceShape = {
    .num_layers = 4, .num_tokens = 500, .num_experts = kExperts, .top_k = 2};

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

TEST(Engine, Int8DispatchIsLossless) {
  const std::vector<Request> requests = ManyPrompts();
  WorldCase c = {.num_ranks = 2};
  c.wire = {.dispatch = comm::RowFormat::kInt8, .combine = comm::RowFormat::kBf16};
  const std::vector<Outcome> int8 = Generate(c, requests);
  c.wire.dispatch = comm::RowFormat::kFp32;
  EXPECT_EQ(Generate(c, requests), int8);
  // The combine wire does round.
  c.wire.combine = comm::RowFormat::kInt8;
  EXPECT_NE(Generate(c, requests), int8);
}

// A bundled model with another activation and KV width in its config: its weights were not trained
// for it, but bits are bits.
class Precisions : public ::testing::Test {
 protected:
  std::string ModelWith(int act_bits, int kv_bits, const char* model = kModel) {
    const std::string path =
        directory_.path() + "/" + std::to_string(act_bits) + "-" + std::to_string(kv_bits);
    std::filesystem::copy(model, path);
    Json config = Json::parse(*base::ReadFile(path + "/config.json"));
    config["act_bits"] = act_bits;
    config["kv_bits"] = kv_bits;
    EXPECT_TRUE(base::WriteFileAtomically(path + "/config.json", config.dump()).ok());
    return path;
  }

  test::TempDir directory_;
};

TEST_F(Precisions, FourBitActivationsAndThreeBitCacheOnAnyNumberOfRanks) {
  const std::string model = kModelA48;
  std::vector<Request> requests = ManyPrompts();
  requests.resize(6);
  requests.push_back(RandomPrompt(150, 6, 7));  // more than a page
  const std::vector<Outcome> expected = Generate({.model = model}, requests);
  for (int num_ranks = 2; num_ranks <= 4; ++num_ranks) {
    EXPECT_EQ(Generate({.num_ranks = num_ranks, .max_rows = 23, .model = model}, requests),
              expected);
  }
  // Both widths do something.
  EXPECT_NE(Generate({.model = ModelWith(8, 3, kModelA48)}, requests), expected);
  EXPECT_NE(Generate({.model = ModelWith(4, 16, kModelA48)}, requests), expected);
  EXPECT_NE(Generate({.kv = kernels::KvFormat::kInt4, .model = model}, requests), expected);
  EXPECT_EQ(Generate({.kv = kernels::KvFormat::kInt3, .model = model}, requests), expected);
}

TEST_F(Precisions, DispatchIsLosslessDownToTheModelsWidth) {
  std::vector<Request> requests = ManyPrompts();
  requests.resize(5);
  for (const int act_bits : {8, 4}) {
    WorldCase c = {.num_ranks = 3, .wire = {}, .model = ModelWith(act_bits, 16)};
    const std::vector<Outcome> expected = Generate(c, requests);
    for (const auto dispatch :
         {comm::RowFormat::kFp32, comm::RowFormat::kInt8, comm::RowFormat::kInt4}) {
      if (act_bits == 8 && dispatch == comm::RowFormat::kInt4) continue;
      c.wire.dispatch = dispatch;
      EXPECT_EQ(Generate(c, requests), expected) << comm::RowFormatName(dispatch).data();
    }
  }
}

TEST_F(Precisions, EveryCacheFormatGivesTheSameBitsEverywhere) {
  const std::vector<Request> requests = {RandomPrompt(140, 4, 1), RandomPrompt(30, 6, 2)};
  std::vector<std::vector<Outcome>> seen;
  for (const auto kv : {kernels::KvFormat::kBf16, kernels::KvFormat::kInt8,
                        kernels::KvFormat::kInt4, kernels::KvFormat::kInt3}) {
    const std::vector<Outcome> expected = Generate({.max_rows = 512, .kv = kv}, requests);
    EXPECT_EQ(Generate({.num_ranks = 2, .max_rows = 9, .kv = kv}, requests), expected);
    for (const std::vector<Outcome>& other : seen) EXPECT_NE(expected, other);
    seen.push_back(expected);
  }
  EXPECT_EQ(Generate({}, requests), seen[0]);  // the model's own
  // This model's heads are rotated at int3, which one trained at 3 bits does without.
  EXPECT_NE(Generate({.model = ModelWith(8, 3)}, requests), seen[3]);
}

// Logits of scored requests, each on the rank that owns it, and what the engine says of itself.
using Scores = std::map<std::pair<SequenceId, int32_t>, std::vector<float>>;
struct Rung {
  WireOptions wire;
  kernels::KvFormat kv;
};

// Walks the rungs on one engine per rank that was made for the first of them.
std::vector<std::vector<Scores>> WalkLadder(const WorldCase& c, const std::vector<Rung>& rungs,
                                            const std::vector<Request>& requests) {
  std::vector<std::vector<Scores>> scores(rungs.size(), std::vector<Scores>(c.num_ranks));
  const auto statuses = comm::RunLoopback(c.num_ranks, [&](comm::Transport& transport) {
    const int rank = base::Index(transport.rank());
    base::ThreadPool threads(1 + rank % 2);
    kernels::Executor executor{.threads = &threads};
    const auto walk = [&]() -> absl::Status {
      WorldCase first = c;
      first.wire = rungs[0].wire;
      first.kv = rungs[0].kv;
      TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                               MakeEngine(first, transport, executor));
      for (size_t i = 0; i < rungs.size(); ++i) {
        if (i > 0) TERNION_RETURN_IF_ERROR(engine->Reconfigure(rungs[i].wire, rungs[i].kv));
        EXPECT_EQ(engine->kv_format(), rungs[i].kv);
        EXPECT_EQ(engine->wire().dispatch.value(),
                  rungs[i].wire.dispatch.value_or(comm::RowFormat::kInt8));
        engine->set_logits_sink(
            [&](SequenceId id, int32_t position, std::span<const float> logits) {
              scores[i][rank][{id, position}].assign(logits.begin(), logits.end());
            });
        if (rank != 0) {
          TERNION_RETURN_IF_ERROR(engine->Follow());
          continue;
        }
        for (const Request& request : requests) {
          TERNION_RETURN_IF_ERROR(engine->Submit(request).status());
        }
        std::map<SequenceId, Outcome> outcomes;
        TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
        TERNION_RETURN_IF_ERROR(engine->Stop());
      }
      return absl::OkStatus();
    };
    return walk();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  return scores;
}

TEST(Reconfigure, GivesTheBitsOfAFreshEngine) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 7; ++i) {
    requests.push_back(RandomPrompt(20 + 19 * i, 0, i));
    requests.back().score = true;
  }
  using kernels::KvFormat;
  const std::vector<Rung> rungs = {{kExact, KvFormat::kInt3},
                                   {{}, KvFormat::kBf16},
                                   {{.combine = comm::RowFormat::kInt4}, KvFormat::kInt8},
                                   {{.dispatch = comm::RowFormat::kFp32}, KvFormat::kInt4},
                                   {kExact, KvFormat::kInt3}};
  const WorldCase c = {.num_ranks = 3, .kv_tokens = 512};
  const auto walked = WalkLadder(c, rungs, requests);
  for (size_t i = 0; i < rungs.size(); ++i) {
    SCOPED_TRACE("rung " + std::to_string(i));
    EXPECT_EQ(walked[i], WalkLadder(c, {rungs[i]}, requests)[0]);
    size_t rows = 0;
    for (int rank = 0; rank < c.num_ranks; ++rank) {
      EXPECT_FALSE(walked[i][rank].empty());
      rows += walked[i][rank].size();
      // The same owners on every rung.
      EXPECT_EQ(walked[i][rank].size(), walked[0][rank].size());
      for (const auto& [row, logits] : walked[i][rank]) EXPECT_TRUE(walked[0][rank].contains(row));
    }
    size_t expected_rows = 0;
    for (const Request& request : requests) expected_rows += request.prompt.size();
    EXPECT_EQ(rows, expected_rows);
  }
  EXPECT_NE(walked[1], walked[0]);
  EXPECT_EQ(walked[4], walked[0]);
}

TEST(Reconfigure, WhatDoesNotGoIsAnAgreedErrorAndChangesNothing) {
  const std::vector<Request> requests = {RandomPrompt(30, 6, 1), RandomPrompt(20, 4, 2)};
  const std::vector<Outcome> expected = Generate({.num_ranks = 2}, requests);
  std::map<SequenceId, Outcome> outcomes;
  const auto statuses = comm::RunLoopback(2, [&](comm::Transport& transport) -> absl::Status {
    base::ThreadPool threads(1);
    kernels::Executor executor{.threads = &threads};
    TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                             MakeEngine({.num_ranks = 2}, transport, executor));
    const bool is_root = transport.rank() == RankId{0};
    const WireOptions int4 = {.dispatch = comm::RowFormat::kInt4};
    const absl::Status refused = engine->Reconfigure(int4, kernels::KvFormat::kInt8);
    EXPECT_TRUE(IsInvalid(refused, "int4 dispatch"));
    EXPECT_TRUE(comm::IsAgreed(refused));
    for (const Request& request : requests) {
      if (is_root) TERNION_RETURN_IF_ERROR(engine->Submit(request).status());
    }
    const absl::Status busy = engine->Reconfigure({}, kernels::KvFormat::kInt8);
    EXPECT_TRUE(IsError(busy, absl::StatusCode::kFailedPrecondition, "still running"));
    EXPECT_EQ(engine->kv_format(), kernels::KvFormat::kBf16);
    EXPECT_TRUE(engine->wire().exact);
    if (!is_root) return engine->Follow();
    TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
    return engine->Stop();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  ASSERT_EQ(outcomes.size(), 2u);
  EXPECT_EQ(outcomes[SequenceId{0}], expected[0]);
  EXPECT_EQ(outcomes[SequenceId{1}], expected[1]);
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

// A rank whose sends fail after a while.
class FailingTransport : public comm::Transport {
 public:
  FailingTransport(comm::Transport* inner, int good_sends)
      : Transport(std::make_shared<comm::MessagePool>()), inner_(inner), good_sends_(good_sends) {}

  RankId rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  int NodeOf(RankId rank) const override { return inner_->NodeOf(rank); }
  absl::Status Send(RankId to, comm::Phase phase, comm::Message message) override {
    if (good_sends_-- <= 0) return absl::InternalError("pulled the plug");
    return inner_->Send(to, phase, std::move(message));
  }
  absl::StatusOr<comm::Arrival> Receive(std::span<const comm::Awaited> awaited) override {
    return inner_->Receive(awaited);
  }
  absl::StatusOr<std::optional<comm::Arrival>> TryReceive(
      std::span<const comm::Awaited> awaited) override {
    return inner_->TryReceive(awaited);
  }
  void Abort(const absl::Status& status) override { inner_->Abort(status); }

 private:
  comm::Transport* const inner_;
  int good_sends_;
};

TEST(Engine, ARankThatFailsEndsTheOthers) {
  // Wherever it fails: while loading, between dispatch and combine, or with its results.
  for (const int good_sends : {0, 1, 2, 3, 17, 50, 81}) {
    SCOPED_TRACE(good_sends);
    const auto statuses = comm::RunLoopback(3, [&](comm::Transport& world) -> absl::Status {
      const bool fails = world.rank() == RankId{1};
      FailingTransport transport(&world, fails ? good_sends : 1 << 30);
      base::ThreadPool threads(1);
      kernels::Executor executor{.threads = &threads};
      TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                               MakeEngine({.num_ranks = 3}, transport, executor));
      if (world.rank() != RankId{0}) return engine->Follow();
      TERNION_RETURN_IF_ERROR(engine->Submit(RandomPrompt(20, 400, 1)).status());
      std::map<SequenceId, Outcome> outcomes;
      TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
      return engine->Stop();
    });
    EXPECT_TRUE(IsError(statuses[1], absl::StatusCode::kInternal, "pulled the plug"));
    for (const int rank : {0, 2}) {
      EXPECT_TRUE(IsError(statuses[rank], absl::StatusCode::kUnavailable, "is gone")) << rank;
    }
  }
}

TEST(Engine, WhenRankZeroFailsTheOthersEnd) {
  const auto statuses = RunEngines({.num_ranks = 3}, [&](Engine& engine) -> absl::Status {
    TERNION_RETURN_IF_ERROR(engine.Submit(RandomPrompt(20, 400, 1)).status());
    for (int step = 0; step < 3; ++step) TERNION_RETURN_IF_ERROR(engine.Step().status());
    return absl::InternalError("pulled the plug");
  });
  EXPECT_TRUE(IsError(statuses[0], absl::StatusCode::kInternal, "pulled the plug"));
  for (const int rank : {1, 2}) {
    EXPECT_TRUE(IsError(statuses[rank], absl::StatusCode::kUnavailable, "rank 0 is gone: pulled"));
  }
}

TEST(Engine, WrongPlacementsAreAgreedErrors) {
  test::TempDir directory;
  // Abseil makes its table of error texts at the first failure, with a lock that ThreadSanitizer
  // does not see.
  EXPECT_FALSE(base::ReadFile(directory.path() + "/none").ok());
  const auto errors = [&](const std::string& placement) {
    return RunEngines({.num_ranks = 2, .placement = placement},
                      [](Engine&) { return absl::OkStatus(); });
  };
  for (const absl::Status& status : errors(directory.path() + "/none.json")) {
    EXPECT_TRUE(IsError(status, absl::StatusCode::kNotFound, "none.json"));
    EXPECT_TRUE(comm::IsAgreed(status));
  }
  const std::string beyond = directory.Write("beyond.json", PlacementJson([](int) { return 2; }));
  for (const absl::Status& status : errors(beyond)) {
    EXPECT_TRUE(IsInvalid(status, "beyond.json: placement of layer 0, expert 0: names rank 2"));
  }
}

TEST(Engine, TracesOfAnotherModelAreRefused) {
  test::TempDir directory;
  const auto error_with = [&](const experts::TraceShape& shape) {
    const std::string trace = directory.path("trace.bin");
    EXPECT_TRUE(experts::SaveTrace(*experts::UniformTrace(1, shape), trace).ok());
    return RunEngines({.placement = "local", .trace = trace},
                      [](Engine&) { return absl::OkStatus(); })[0];
  };
  EXPECT_TRUE(error_with(kTraceShape).ok());
  EXPECT_TRUE(
      IsInvalid(error_with({5, 9, 16, 2}), "trace.bin: the trace has 5 layers, the model 4"));
  EXPECT_TRUE(IsInvalid(error_with({4, 9, 8, 2}), "the trace has 8 experts, the model 16"));
  EXPECT_TRUE(
      IsInvalid(error_with({4, 9, 16, 3}), "the trace has 3 experts per token, the model 2"));
}

// A copy of a golden model with its config changed.
class BrokenModel : public ::testing::Test {
 protected:
  absl::Status LoadWith(const std::string& name, const std::string& key, const Json& value,
                        std::optional<kernels::KvFormat> kv = std::nullopt) {
    const std::string golden = TERNION_SOURCE_DIR "/tests/oracle/golden/" + name;
    for (const auto& entry : std::filesystem::directory_iterator(golden)) {
      std::filesystem::copy(entry.path(),
                            std::filesystem::path(directory_.path()) / entry.path().filename(),
                            std::filesystem::copy_options::overwrite_existing);
    }
    Json config = Json::parse(*base::ReadFile(golden + "/config.json"));
    config[key] = value;
    directory_.Write("config.json", config.dump());
    const auto statuses = comm::RunLoopback(2, [&](comm::Transport& transport) -> absl::Status {
      base::ThreadPool threads(1);
      kernels::Executor executor{.threads = &threads};
      return MakeEngine({.num_ranks = 2, .kv = kv, .model = directory_.path()}, transport, executor)
          .status();
    });
    EXPECT_EQ(statuses[0], statuses[1]);
    return statuses[0];
  }

  test::TempDir directory_;
};

TEST_F(BrokenModel, ConfigAndTensorsThatDisagree) {
  constexpr char kMoe[] = "bitnet_moe_silu";
  EXPECT_TRUE(LoadWith(kMoe, "num_experts", 8).ok());
  EXPECT_TRUE(IsInvalid(LoadWith(kMoe, "num_experts", 7), "num_experts is 7"));
  EXPECT_TRUE(IsError(LoadWith(kMoe, "num_experts", 9), absl::StatusCode::kNotFound,
                      "model.layers.0.mlp.experts.8.gate_proj.weight"));
  EXPECT_TRUE(IsInvalid(LoadWith(kMoe, "moe_intermediate_size", 68),
                        "experts.0.gate_proj.weight has shape"));
  EXPECT_TRUE(IsInvalid(LoadWith(kMoe, "vocab_size", 132), "embed_tokens.weight has shape"));
  EXPECT_TRUE(IsError(LoadWith(kMoe, "num_hidden_layers", 3), absl::StatusCode::kNotFound,
                      "model.layers.2."));
  EXPECT_TRUE(IsError(LoadWith(kMoe, "tie_word_embeddings", false), absl::StatusCode::kNotFound,
                      "lm_head.weight"));
  EXPECT_TRUE(IsInvalid(LoadWith("bitnet_relu2_tied", "num_key_value_heads", 6),
                        "k_proj.weight has shape"));
}

TEST_F(BrokenModel, HeadsThatCannotBeRotated) {
  constexpr char kDense[] = "bitnet_relu2_tied";
  const std::string golden = TERNION_SOURCE_DIR "/tests/oracle/golden/";
  const Json config = Json::parse(*base::ReadFile(golden + kDense + "/config.json"));
  const int head_dim = config["head_dim"];
  ASSERT_NE(head_dim & (head_dim - 1), 0) << head_dim;
  for (const auto kv : {kernels::KvFormat::kInt4, kernels::KvFormat::kInt3}) {
    const absl::Status status = LoadWith(kDense, "kv_bits", 16, kv);
    EXPECT_TRUE(IsInvalid(status, "power of two"));
    EXPECT_TRUE(comm::IsAgreed(status));
    EXPECT_TRUE(IsInvalid(LoadWith(kDense, "kv_bits", 8, kv), "power of two"));
    EXPECT_TRUE(LoadWith(kDense, "kv_bits", 3, kv).ok());  // trained for it: no rotation
  }
  EXPECT_TRUE(LoadWith(kDense, "kv_bits", 16, kernels::KvFormat::kInt8).ok());
  EXPECT_TRUE(LoadWith(kDense, "kv_bits", 4).ok());
}

}  // namespace
}  // namespace ternion::runtime
