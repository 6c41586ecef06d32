#include "runtime/batch.h"

#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/status.h"

namespace ternion::runtime {
namespace {

using test::IsInvalid;

constexpr int64_t kVocab = 1000;
constexpr int kRanks = 5;

std::vector<int32_t> RandomTokens(size_t count, std::mt19937& random) {
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = random() % kVocab;
  return tokens;
}

StepPlan RandomPlan(std::mt19937& random) {
  StepPlan plan;
  plan.step = random();
  plan.stop = random() % 8 == 0;
  for (int i = random() % 4; i > 0; --i) plan.ended.push_back(SequenceId(random() % 100));
  for (int i = random() % 4; i > 0; --i) {
    plan.starts.push_back({SequenceId(random() % 100),
                           RankId(random() % kRanks),
                           static_cast<int32_t>(1 + random() % 500),
                           {0.5f, static_cast<int32_t>(random() % 50), 0.9f, random()}});
  }
  for (int i = random() % 5; i > 0; --i) {
    Chunk chunk;
    chunk.sequence = SequenceId(random() % 100);
    chunk.owner = RankId(random() % kRanks);
    chunk.position = random() % 1000;
    chunk.tokens = RandomTokens(1 + random() % 20, random);
    chunk.sample = random() % 2 == 0;
    if (!chunk.sample && random() % 2 == 0) {
      chunk.targets = RandomTokens(chunk.tokens.size(), random);
      chunk.targets.back() = kNoTarget;
    }
    plan.chunks.push_back(chunk);
  }
  return plan;
}

void ExpectSame(const StepPlan& a, const StepPlan& b) {
  EXPECT_EQ(a.step, b.step);
  EXPECT_EQ(a.stop, b.stop);
  EXPECT_EQ(a.ended, b.ended);
  ASSERT_EQ(a.starts.size(), b.starts.size());
  for (size_t i = 0; i < a.starts.size(); ++i) {
    EXPECT_EQ(a.starts[i].id, b.starts[i].id);
    EXPECT_EQ(a.starts[i].owner, b.starts[i].owner);
    EXPECT_EQ(a.starts[i].max_tokens, b.starts[i].max_tokens);
    EXPECT_EQ(a.starts[i].sampling.temperature, b.starts[i].sampling.temperature);
    EXPECT_EQ(a.starts[i].sampling.top_k, b.starts[i].sampling.top_k);
    EXPECT_EQ(a.starts[i].sampling.top_p, b.starts[i].sampling.top_p);
    EXPECT_EQ(a.starts[i].sampling.seed, b.starts[i].sampling.seed);
  }
  ASSERT_EQ(a.chunks.size(), b.chunks.size());
  for (size_t i = 0; i < a.chunks.size(); ++i) {
    EXPECT_EQ(a.chunks[i].sequence, b.chunks[i].sequence);
    EXPECT_EQ(a.chunks[i].owner, b.chunks[i].owner);
    EXPECT_EQ(a.chunks[i].position, b.chunks[i].position);
    EXPECT_EQ(a.chunks[i].sample, b.chunks[i].sample);
    EXPECT_EQ(a.chunks[i].tokens, b.chunks[i].tokens);
    EXPECT_EQ(a.chunks[i].targets, b.chunks[i].targets);
  }
}

// What the engine relies on without looking again.
void ExpectValid(const StepPlan& plan) {
  for (const SequenceStart& start : plan.starts) {
    EXPECT_GE(base::Index(start.owner), 0);
    EXPECT_LT(base::Index(start.owner), kRanks);
    EXPECT_GT(start.max_tokens, 0);
  }
  for (const Chunk& chunk : plan.chunks) {
    EXPECT_GE(base::Index(chunk.owner), 0);
    EXPECT_LT(base::Index(chunk.owner), kRanks);
    EXPECT_GE(chunk.position, 0);
    EXPECT_FALSE(chunk.tokens.empty());
    EXPECT_TRUE(chunk.targets.empty() || chunk.targets.size() == chunk.tokens.size());
    for (int32_t token : chunk.tokens) EXPECT_TRUE(token >= 0 && token < kVocab);
    for (int32_t target : chunk.targets) EXPECT_TRUE(target >= kNoTarget && target < kVocab);
  }
}

absl::StatusOr<StepPlan> Parse(const std::string& bytes) {
  return StepPlan::Parse(bytes, kVocab, kRanks);
}

TEST(StepPlan, RoundTrip) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const StepPlan plan = RandomPlan(random);
    const auto parsed = Parse(plan.Serialize());
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    ASSERT_NO_FATAL_FAILURE(ExpectSame(*parsed, plan));
    ExpectValid(*parsed);
  }
}

TEST(StepPlan, EveryTruncationAndExtensionIsAnError) {
  std::mt19937 random(2);
  for (int round = 0; round < 20; ++round) {
    const std::string bytes = RandomPlan(random).Serialize();
    for (size_t size = 0; size < bytes.size(); ++size) {
      EXPECT_TRUE(IsInvalid(Parse(bytes.substr(0, size)).status(), "malformed step plan"));
    }
    EXPECT_TRUE(IsInvalid(Parse(bytes + '\0').status(), "malformed step plan"));
  }
}

TEST(StepPlan, FlippedBytesAreAnErrorOrAValidPlan) {
  std::mt19937 random(3);
  int errors = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string bytes = RandomPlan(random).Serialize();
    for (int flips = 1 + random() % 3; flips > 0; --flips) {
      bytes[random() % bytes.size()] ^= static_cast<char>(1 + random() % 255);
    }
    const auto parsed = Parse(bytes);
    if (parsed.ok()) {
      ExpectValid(*parsed);
    } else {
      ++errors;
    }
  }
  EXPECT_GT(errors, 1000);
}

TEST(StepPlan, OutOfRangeIsAnError) {
  StepPlan good;
  good.starts = {{SequenceId{1}, RankId{4}, 10, {}}};
  good.chunks = {{SequenceId{1}, RankId{4}, 0, false, {1, 2}, {2, kNoTarget}}};
  ASSERT_TRUE(Parse(good.Serialize()).ok());
  const auto refused = [&](auto change) {
    StepPlan plan = good;
    change(plan);
    return IsInvalid(Parse(plan.Serialize()).status(), "malformed step plan");
  };
  EXPECT_TRUE(refused([](StepPlan& p) { p.starts[0].owner = RankId{5}; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.starts[0].owner = RankId{-1}; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.starts[0].max_tokens = 0; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].owner = RankId{5}; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].position = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].tokens[1] = kVocab; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].tokens[0] = -1; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].targets[0] = kVocab; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].targets[0] = -2; }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].targets.pop_back(); }));
  EXPECT_TRUE(refused([](StepPlan& p) { p.chunks[0].tokens = p.chunks[0].targets = {}; }));
}

TEST(Results, RoundTripAndErrors) {
  const std::vector<ChunkResult> results = {{SequenceId{3}, 7, 0xfedcba9876543210, 1.25},
                                            {SequenceId{4}, -1, 0, -0.0}};
  const std::string bytes = SerializeResults(results);
  const auto parsed = ParseResults(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  ASSERT_EQ(parsed->size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ((*parsed)[i].sequence, results[i].sequence);
    EXPECT_EQ((*parsed)[i].token, results[i].token);
    EXPECT_EQ((*parsed)[i].logits_hash, results[i].logits_hash);
    EXPECT_EQ((*parsed)[i].nll, results[i].nll);
  }
  EXPECT_TRUE(ParseResults(SerializeResults({}))->empty());
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_TRUE(IsInvalid(ParseResults(bytes.substr(0, size)).status(), "malformed"));
  }
  EXPECT_TRUE(IsInvalid(ParseResults(bytes + "x").status(), "malformed"));
}

}  // namespace
}  // namespace ternion::runtime
