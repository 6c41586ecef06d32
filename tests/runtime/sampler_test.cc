#include "runtime/sampler.h"

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/select.h"

namespace ternion::runtime {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

int32_t SampleToken(const std::vector<float>& logits, const SamplingParams& params,
                    int64_t position) {
  static base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  const kernels::SampleParams at = ParamsAt(params, position);
  int32_t token = -1;
  kernels::SelectCpuKernels("")->sample({.logits = logits.data(),
                                         .params = &at,
                                         .tokens = &token,
                                         .num_rows = 1,
                                         .vocab = static_cast<int64_t>(logits.size())},
                                        executor);
  return token;
}

int32_t Greedy(const std::vector<float>& logits) { return SampleToken(logits, {}, 0); }

// How often each token comes at positions 0 .. draws - 1.
std::map<int32_t, int> Histogram(const std::vector<float>& logits, const SamplingParams& params,
                                 int draws) {
  std::map<int32_t, int> counts;
  for (int position = 0; position < draws; ++position) {
    ++counts[SampleToken(logits, params, position)];
  }
  return counts;
}

std::set<int32_t> TokensOf(const std::map<int32_t, int>& counts) {
  std::set<int32_t> tokens;
  for (const auto& [token, count] : counts) tokens.insert(token);
  return tokens;
}

TEST(Greedy, TakesTheLargest) {
  EXPECT_EQ(Greedy({0.5f}), 0);
  EXPECT_EQ(Greedy({-3, -1, -2}), 1);
  EXPECT_EQ(Greedy({1, 2, 3}), 2);
  EXPECT_EQ(Greedy({1, kInf, 3}), 1);
}

TEST(Greedy, LowerIdWinsTies) {
  EXPECT_EQ(Greedy({1, 7, 7, 7}), 1);
  EXPECT_EQ(Greedy({0.0f, -0.0f}), 0);
  EXPECT_EQ(Greedy({-kInf, -kInf}), 0);
}

TEST(Greedy, NanCountsAsMinusInfinity) {
  EXPECT_EQ(Greedy({kNan, -5, kNan, -4, kNan}), 3);
  EXPECT_EQ(Greedy({-5, kNan}), 0);
  EXPECT_EQ(Greedy({kNan, -5}), 1);
  EXPECT_EQ(Greedy({kNan, kNan, kNan}), 0);
  EXPECT_EQ(Greedy({kNan, -kInf}), 0);
}

TEST(Sample, IgnoresNan) {
  const std::vector<float> logits = {kNan, 1, kNan, 1, kNan};
  EXPECT_EQ(TokensOf(Histogram(logits, {.temperature = 5}, 200)), std::set<int32_t>({1, 3}));
  EXPECT_EQ(SampleToken(std::vector<float>{kNan, kNan}, {.temperature = 1}, 0), 0);
}

TEST(Sample, InfinitiesGiveATokenThatIsThere) {
  for (int position = 0; position < 20; ++position) {
    const SamplingParams params = {.temperature = 1, .seed = 3};
    EXPECT_EQ(SampleToken(std::vector<float>{0, kInf, 0}, params, position), 1);
    const int32_t token = SampleToken(std::vector<float>{-kInf, -kInf}, params, position);
    EXPECT_TRUE(token == 0 || token == 1);
  }
}

TEST(Sample, TopKKeepsTheLargest) {
  const std::vector<float> logits = {0, 4, 1, 3, 2};
  EXPECT_EQ(TokensOf(Histogram(logits, {.temperature = 100, .top_k = 2}, 200)),
            std::set<int32_t>({1, 3}));
  EXPECT_EQ(TokensOf(Histogram(logits, {.temperature = 100, .top_k = 1}, 50)),
            std::set<int32_t>({1}));
  EXPECT_EQ(Histogram(logits, {.temperature = 100, .top_k = 0}, 300).size(), 5u);
  EXPECT_EQ(Histogram(logits, {.temperature = 100, .top_k = 9}, 300).size(), 5u);
  // Of equals, the lower ids.
  EXPECT_EQ(TokensOf(Histogram({1, 1, 1, 1}, {.temperature = 1, .top_k = 2}, 100)),
            std::set<int32_t>({0, 1}));
}

TEST(Sample, TopPKeepsTheSmallestSetWithThatMass) {
  // Probabilities 0.1, 0.5, 0.1, 0.3.
  const std::vector<float> logits = {std::log(0.1f), std::log(0.5f), std::log(0.1f),
                                     std::log(0.3f)};
  const auto tokens = [&](float top_p) {
    return TokensOf(Histogram(logits, {.temperature = 1, .top_p = top_p}, 500));
  };
  EXPECT_EQ(tokens(0.0f), std::set<int32_t>({1}));
  EXPECT_EQ(tokens(0.4f), std::set<int32_t>({1}));
  EXPECT_EQ(tokens(0.6f), std::set<int32_t>({1, 3}));
  EXPECT_EQ(tokens(0.79f), std::set<int32_t>({1, 3}));
  EXPECT_EQ(tokens(0.85f), std::set<int32_t>({0, 1, 3}));
  EXPECT_EQ(tokens(1.0f), std::set<int32_t>({0, 1, 2, 3}));
}

TEST(Sample, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {0.5f, 2.0f, -1.0f, 1.0f, 0.0f};
  constexpr int kDraws = 20000;
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    double total = 0;
    for (float logit : logits) total += std::exp(logit / temperature);
    const auto counts = Histogram(logits, {.temperature = temperature, .seed = 11}, kDraws);
    for (size_t token = 0; token < logits.size(); ++token) {
      const double p = std::exp(logits[token] / temperature) / total;
      const auto found = counts.find(token);
      const double frequency = found == counts.end() ? 0.0 : double(found->second) / kDraws;
      // Five standard deviations.
      EXPECT_NEAR(frequency, p, 5 * std::sqrt(p * (1 - p) / kDraws)) << token;
    }
  }
}

TEST(Sample, DependsOnSeedAndPositionAlone) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> logits(50);
  for (float& logit : logits) logit = normal(random);
  const auto draw = [&](uint64_t seed, int64_t position) {
    return SampleToken(logits, {.temperature = 1.5f, .top_k = 40, .top_p = 0.95f, .seed = seed},
                       position);
  };
  std::vector<int32_t> first, again, next, other;
  for (int position = 0; position < 50; ++position) first.push_back(draw(1, position));
  for (int position = 49; position >= 0; --position) {
    again.insert(again.begin(), draw(1, position));
    next.insert(next.begin(), draw(1, position + 1));
    other.insert(other.begin(), draw(2, position));
  }
  EXPECT_EQ(first, again);
  EXPECT_NE(first, other);
  EXPECT_NE(first, next);
  EXPECT_GT(std::set<int32_t>(first.begin(), first.end()).size(), 5u);
}

TEST(NegativeLogLikelihood, OfTheSoftmax) {
  const std::vector<float> logits = {1.0f, 2.0f, 3.0f};
  const double total = std::exp(1.0) + std::exp(2.0) + std::exp(3.0);
  for (int32_t target = 0; target < 3; ++target) {
    EXPECT_NEAR(NegativeLogLikelihood(logits, target), std::log(total) - logits[target], 1e-12);
  }
  // Far from zero, neither end overflows.
  EXPECT_NEAR(NegativeLogLikelihood(std::vector<float>{1000, 1000}, 0), std::log(2.0), 1e-9);
  EXPECT_NEAR(NegativeLogLikelihood(std::vector<float>{-1000, 1000}, 0), 2000, 1e-9);
}

}  // namespace
}  // namespace ternion::runtime
