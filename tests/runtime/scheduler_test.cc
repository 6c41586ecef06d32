#include "runtime/scheduler.h"

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/kv_cache.h"
#include "tests/testing/status.h"

namespace ternion::runtime {
namespace {

using test::IsError;
using test::IsInvalid;

constexpr int64_t kVocab = 100;

// Ranks that keep books instead of computing: they check every plan and make up tokens.
class FakeRanks {
 public:
  explicit FakeRanks(const SchedulerLimits& limits)
      : limits_(limits), free_pages_(limits.num_ranks, limits.pages_per_rank) {}

  void Expect(SequenceId id, const Request& request) { requests_[id] = request; }

  std::vector<ChunkResult> Execute(const StepPlan& plan) {
    for (SequenceId id : plan.ended) End(id);
    for (const SequenceStart& start : plan.starts) Start(start);
    std::vector<int64_t> rows(limits_.num_ranks);
    std::set<SequenceId> in_plan;
    std::vector<ChunkResult> results;
    for (const Chunk& chunk : plan.chunks) {
      EXPECT_TRUE(in_plan.insert(chunk.sequence).second) << "two chunks of one sequence";
      rows[base::Index(chunk.owner)] += chunk.tokens.size();
      results.push_back(Run(chunk));
    }
    for (int64_t count : rows) EXPECT_LE(count, limits_.max_rows);
    EXPECT_EQ(in_plan.empty(), sequences_.empty()) << "work is left, but none is planned";
    return results;
  }

  // A made-up continuation, the same whatever the chunks.
  static int32_t TokenAt(SequenceId id, int64_t position) {
    return static_cast<int32_t>((base::Index(id) * 31 + position * 17 + 5) % kVocab);
  }

  void ExpectAllPagesFree(const std::vector<SequenceId>& last_ended) {
    for (SequenceId id : last_ended) End(id);
    EXPECT_TRUE(sequences_.empty());
    for (int64_t free : free_pages_) EXPECT_EQ(free, limits_.pages_per_rank);
  }

 private:
  struct Sequence {
    RankId owner{};
    int64_t max_tokens = 0;
    std::vector<int32_t> tokens;  // prompt and what was sampled
    size_t seen = 0;
  };

  void Start(const SequenceStart& start) {
    ASSERT_EQ(sequences_.count(start.id), 0u);
    ASSERT_EQ(requests_.count(start.id), 1u);
    const Request& request = requests_[start.id];
    EXPECT_EQ(start.sampling.seed, request.sampling.seed);
    int64_t& free = free_pages_[base::Index(start.owner)];
    free -= KvCache::PagesFor(start.max_tokens);
    EXPECT_GE(free, 0) << "more pages than the rank has";
    sequences_[start.id] = {start.owner, start.max_tokens, request.prompt, 0};
  }

  void End(SequenceId id) {
    ASSERT_EQ(sequences_.count(id), 1u);
    const Sequence& sequence = sequences_[id];
    free_pages_[base::Index(sequence.owner)] += KvCache::PagesFor(sequence.max_tokens);
    sequences_.erase(id);
  }

  ChunkResult Run(const Chunk& chunk) {
    Sequence& sequence = sequences_.at(chunk.sequence);
    const Request& request = requests_[chunk.sequence];
    const size_t count = chunk.tokens.size();
    EXPECT_EQ(chunk.owner, sequence.owner);
    EXPECT_EQ(chunk.position, static_cast<int64_t>(sequence.seen));  // each position once, in order
    EXPECT_GT(count, 0u);
    EXPECT_LE(sequence.seen + count, static_cast<size_t>(sequence.max_tokens));
    EXPECT_LE(sequence.seen + count, sequence.tokens.size());
    EXPECT_TRUE(std::equal(chunk.tokens.begin(), chunk.tokens.end(),
                           sequence.tokens.begin() + sequence.seen));
    sequence.seen += count;
    ChunkResult result{.sequence = chunk.sequence};
    if (request.score) {
      EXPECT_FALSE(chunk.sample);
      std::vector<int32_t> targets(
          sequence.tokens.begin() + chunk.position + 1,
          sequence.tokens.begin() + std::min(sequence.tokens.size(), sequence.seen + 1));
      targets.resize(count, kNoTarget);
      EXPECT_EQ(chunk.targets, targets);
      result.nll = static_cast<double>(count);
    } else {
      EXPECT_TRUE(chunk.targets.empty());
      EXPECT_EQ(chunk.sample, sequence.seen == sequence.tokens.size());
      if (chunk.sample) {
        result.token = TokenAt(chunk.sequence, sequence.seen);
        sequence.tokens.push_back(result.token);
      }
    }
    return result;
  }

  const SchedulerLimits limits_;
  std::vector<int64_t> free_pages_;
  std::map<SequenceId, Request> requests_;
  std::map<SequenceId, Sequence> sequences_;
};

// What should come of a request, given the made-up tokens.
struct Ending {
  std::vector<int32_t> generated;
  FinishReason finish = FinishReason::kNone;
  double nll = 0;
};

Ending Expected(const SchedulerLimits& limits, SequenceId id, const Request& request) {
  const int64_t prompt = request.prompt.size();
  if (request.score) return {{}, FinishReason::kLength, static_cast<double>(prompt)};
  Ending ending;
  while (ending.finish == FinishReason::kNone) {
    const int64_t position = prompt + static_cast<int64_t>(ending.generated.size());
    const int32_t token = FakeRanks::TokenAt(id, position);
    ending.generated.push_back(token);
    const auto& stops = request.stop_ids;
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
      ending.finish = FinishReason::kStop;
    } else if (static_cast<int32_t>(ending.generated.size()) == request.max_new_tokens ||
               position + 1 >= limits.max_positions) {
      ending.finish = FinishReason::kLength;
    }
  }
  return ending;
}

Request RandomRequest(const SchedulerLimits& limits, std::mt19937& random) {
  Request request;
  const int64_t budget =
      std::min(limits.max_positions, limits.pages_per_rank * kernels::kPageTokens);
  const int64_t most = random() % 3 == 0 ? budget : std::min<int64_t>(budget, 40);
  request.prompt.resize(1 + random() % most);
  for (int32_t& token : request.prompt) token = random() % kVocab;
  request.score = random() % 4 == 0;
  request.sampling.seed = random();
  if (request.score) return request;
  const int64_t room = budget - static_cast<int64_t>(request.prompt.size());
  request.max_new_tokens = 1 + random() % std::max<int64_t>(1, std::min<int64_t>(room, 60));
  if (room == 0 && budget < limits.max_positions) request.prompt.pop_back();
  if (request.prompt.empty()) request.prompt.push_back(1);
  if (random() % 3 == 0) request.stop_ids = {static_cast<int32_t>(random() % kVocab), 7};
  return request;
}

void Compare(const Ending& ending, const Ending& expected, SequenceId id) {
  EXPECT_EQ(ending.generated, expected.generated) << "sequence " << base::Index(id);
  EXPECT_EQ(ending.finish, expected.finish) << "sequence " << base::Index(id);
  EXPECT_EQ(ending.nll, expected.nll) << "sequence " << base::Index(id);
}

// Requests come at random times; everything ends as it should.
void RunRandomly(const SchedulerLimits& limits, uint32_t seed, int num_requests) {
  std::mt19937 random(seed);
  Scheduler scheduler(limits);
  FakeRanks ranks(limits);
  std::map<SequenceId, Request> requests;
  std::map<SequenceId, Ending> endings;
  int64_t prompt_tokens = 0, expected_prompt_tokens = 0;
  for (int step = 0; !scheduler.idle() || num_requests > 0; ++step) {
    ASSERT_LT(step, 20000) << "it never ends";
    for (int arrivals = random() % 4; arrivals > 0 && num_requests > 0;
         --arrivals, --num_requests) {
      const Request request = RandomRequest(limits, random);
      const auto id = scheduler.Submit(request);
      ASSERT_TRUE(id.ok()) << id.status();
      ASSERT_TRUE(requests.emplace(*id, request).second);
      ranks.Expect(*id, request);
      expected_prompt_tokens += request.prompt.size();
    }
    if (scheduler.idle()) continue;
    const StepPlan plan = scheduler.Next();
    for (const Chunk& chunk : plan.chunks) prompt_tokens += scheduler.PromptTokensOf(chunk);
    std::vector<ChunkResult> results = ranks.Execute(plan);
    std::shuffle(results.begin(), results.end(), random);  // ranks answer in any order
    const auto events = scheduler.Commit(results);
    ASSERT_TRUE(events.ok()) << events.status();
    for (const SequenceEvent& event : *events) {
      Ending& ending = endings[event.sequence];
      EXPECT_EQ(ending.finish, FinishReason::kNone) << "news of a finished sequence";
      if (event.token >= 0) ending.generated.push_back(event.token);
      ending.finish = event.finish;
      ending.nll += event.nll;
    }
    if (::testing::Test::HasFailure()) return;
  }
  ASSERT_EQ(endings.size(), requests.size());
  for (const auto& [id, request] : requests)
    Compare(endings[id], Expected(limits, id, request), id);
  EXPECT_EQ(prompt_tokens, expected_prompt_tokens);
  // The next step frees what ended in the last one.
  ranks.ExpectAllPagesFree(scheduler.Next().ended);
}

TEST(Scheduler, RandomRequestsOnRandomWorlds) {
  const std::vector<SchedulerLimits> worlds = {{.num_ranks = 1,
                                                .max_rows = 8,
                                                .pages_per_rank = 4,
                                                .max_positions = 300,
                                                .vocab_size = kVocab},
                                               {.num_ranks = 3,
                                                .max_rows = 5,
                                                .pages_per_rank = 3,
                                                .max_positions = 512,
                                                .vocab_size = kVocab},
                                               {.num_ranks = 2,
                                                .max_rows = 1,
                                                .pages_per_rank = 2,
                                                .max_positions = 90,
                                                .vocab_size = kVocab},
                                               {.num_ranks = 5,
                                                .max_rows = 64,
                                                .pages_per_rank = 20,
                                                .max_positions = 200,
                                                .vocab_size = kVocab},
                                               {.num_ranks = 1,
                                                .max_rows = 512,
                                                .pages_per_rank = 1,
                                                .max_positions = 4096,
                                                .vocab_size = kVocab}};
  for (size_t world = 0; world < worlds.size(); ++world) {
    for (uint32_t seed = 0; seed < 8; ++seed) {
      SCOPED_TRACE("world " + std::to_string(world) + ", seed " + std::to_string(seed));
      RunRandomly(worlds[world], seed, 40);
      if (HasFailure()) return;
    }
  }
}

constexpr SchedulerLimits kSmall = {.num_ranks = 2,
                                    .max_rows = 16,
                                    .pages_per_rank = 2,
                                    .max_positions = 512,
                                    .vocab_size = kVocab};

Request Prompt(size_t tokens, int32_t max_new_tokens) {
  Request request;
  request.prompt.assign(tokens, 3);
  request.max_new_tokens = max_new_tokens;
  return request;
}

TEST(Scheduler, RefusesWhatCanNeverRun) {
  Scheduler scheduler(kSmall);
  const auto error = [&](const Request& request) { return scheduler.Submit(request).status(); };
  EXPECT_TRUE(IsInvalid(error(Prompt(0, 4)), "the prompt is empty"));
  EXPECT_TRUE(IsInvalid(error(Prompt(513, 4)), "the model has 512 positions"));
  EXPECT_TRUE(IsInvalid(error(Prompt(257, 1)), "a rank has 256"));
  EXPECT_TRUE(IsInvalid(error(Prompt(250, 7)), "a rank has 256"));
  EXPECT_TRUE(IsInvalid(error(Prompt(5, 2147483647)), "a rank has 256"));
  EXPECT_TRUE(IsInvalid(error(Prompt(5, 0)), "max_new_tokens is 0"));
  EXPECT_TRUE(IsInvalid(error(Prompt(200, -150)), "max_new_tokens is -150"));
  Request request = Prompt(5, 1);
  request.prompt[2] = kVocab;
  EXPECT_TRUE(IsInvalid(error(request), "token id 100; the vocabulary ends at 99"));
  request.prompt[2] = -1;
  EXPECT_TRUE(IsInvalid(error(request), "token id -1"));
  request = Prompt(5, 1);
  request.score = true;
  EXPECT_TRUE(IsInvalid(error(request), "it must be 0 to score"));
  EXPECT_TRUE(scheduler.idle());
  EXPECT_TRUE(scheduler.Submit(Prompt(250, 6)).ok());
}

TEST(Scheduler, DecodingComesBeforePrompts) {
  Scheduler scheduler({.num_ranks = 1,
                       .max_rows = 4,
                       .pages_per_rank = 10,
                       .max_positions = 512,
                       .vocab_size = kVocab});
  const SequenceId first = *scheduler.Submit(Prompt(2, 10));
  ASSERT_TRUE(
      scheduler.Commit({{.sequence = scheduler.Next().chunks[0].sequence, .token = 9}}).ok());
  const SequenceId second = *scheduler.Submit(Prompt(7, 10));
  const StepPlan plan = scheduler.Next();
  ASSERT_EQ(plan.chunks.size(), 2u);
  EXPECT_EQ(plan.chunks[0].sequence, first);
  EXPECT_EQ(plan.chunks[0].tokens, std::vector<int32_t>({9}));
  EXPECT_EQ(plan.chunks[1].sequence, second);
  EXPECT_EQ(plan.chunks[1].tokens.size(), 3u);  // what is left of the rows
  EXPECT_FALSE(plan.chunks[1].sample);
}

TEST(Scheduler, RanksShareTheSequences) {
  Scheduler scheduler(kSmall);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(scheduler.Submit(Prompt(3, 1)).ok());
  std::vector<int> on_rank(2);
  for (const SequenceStart& start : scheduler.Next().starts) ++on_rank[base::Index(start.owner)];
  EXPECT_EQ(on_rank, std::vector<int>({2, 2}));
}

TEST(Scheduler, WrongResultsAreErrors) {
  constexpr auto kInternal = absl::StatusCode::kInternal;
  const auto commit = [](const std::function<void(std::vector<ChunkResult>&)>& change) {
    Scheduler scheduler(kSmall);
    const SequenceId a = *scheduler.Submit(Prompt(3, 4));
    const SequenceId b = *scheduler.Submit(Prompt(3, 4));
    EXPECT_EQ(scheduler.Next().chunks.size(), 2u);
    std::vector<ChunkResult> results = {{.sequence = a, .token = 1}, {.sequence = b, .token = 2}};
    change(results);
    return scheduler.Commit(results).status();
  };
  EXPECT_TRUE(commit([](auto&) {}).ok());
  EXPECT_TRUE(IsError(commit([](auto& results) { results[0].sequence = SequenceId{77}; }),
                      kInternal, "sequence 77"));
  EXPECT_TRUE(IsError(commit([](auto& results) { results[1] = results[0]; }), kInternal,
                      "sequence 0, which did not run"));
  EXPECT_TRUE(IsError(commit([](auto& results) { results.pop_back(); }), kInternal,
                      "no rank sent a result for sequence 1"));
  EXPECT_TRUE(IsError(commit([](auto& results) { results[1].token = -1; }), kInternal, "token -1"));
  EXPECT_TRUE(
      IsError(commit([](auto& results) { results[0].token = kVocab; }), kInternal, "token 100"));
}

}  // namespace
}  // namespace ternion::runtime
