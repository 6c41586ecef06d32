// The draw of the next token against one that sorts, on every variant.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/sampling.h"
#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  int32_t token = 0;
  int64_t rank = 0;
  double weight = 0;  // an integer below 2^53 as long as there are few
};

// Candidates in order, cut to what top_k and top_p keep.
std::vector<Candidate> Kept(const std::vector<float>& logits, const SampleParams& params) {
  float largest = -kInfinity;
  for (const float logit : logits) largest = logit > largest ? logit : largest;
  std::vector<Candidate> all;
  for (size_t i = 0; i < logits.size(); ++i) {
    const float distance = logits[i] == largest ? 0.0f : (largest - logits[i]) / params.temperature;
    if (!(distance < 28)) continue;
    const auto rank = static_cast<int64_t>(std::floor(distance * 65536.0));
    all.push_back({static_cast<int32_t>(i), rank, 0});
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Candidate& a, const Candidate& b) { return a.rank < b.rank; });
  if (params.top_k > 0 && all.size() > static_cast<size_t>(params.top_k)) all.resize(params.top_k);
  double total = 0;
  for (Candidate& c : all) {
    c.weight = std::exp(-static_cast<double>(c.rank) / 65536);
    total += c.weight;
  }
  double sum = 0;
  size_t count = 0;
  // In doubt, when a sum is at the edge, what the op does is right, too: tests stay clear of that.
  while (count < all.size() && (count == 0 || sum < params.top_p * total - 1e-5 * total)) {
    sum += all[count++].weight;
  }
  all.resize(count);
  std::sort(all.begin(), all.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return all;
}

// The token whose stretch of the kept weight, in ascending id, has the fraction `random` / 2^64;
// or one of two where that is close to the border of both.
std::vector<int32_t> Expected(const std::vector<float>& logits, const SampleParams& params) {
  const std::vector<Candidate> kept = Kept(logits, params);
  if (kept.empty()) return {0};
  double total = 0;
  for (const Candidate& c : kept) total += c.weight;
  const double target = static_cast<double>(params.random) * 0x1p-64 * total;
  std::vector<int32_t> tokens;
  double sum = 0;
  for (const Candidate& c : kept) {
    if (target > sum - 2e-5 * total && target < sum + c.weight + 2e-5 * total) {
      tokens.push_back(c.token);
    }
    sum += c.weight;
  }
  return tokens;
}

// The same logits for all params.
std::vector<int32_t> Draw(const std::vector<float>& logits,
                          const std::vector<SampleParams>& params) {
  std::vector<float> rows;
  for (size_t i = 0; i < params.size(); ++i) rows.insert(rows.end(), logits.begin(), logits.end());
  return OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    std::vector<int32_t> tokens(params.size(), -1);
    kernels.sample({.logits = rows.data(),
                    .params = params.data(),
                    .tokens = tokens.data(),
                    .num_rows = static_cast<int64_t>(params.size()),
                    .vocab = static_cast<int64_t>(logits.size())},
                   executor);
    return tokens;
  });
}

std::vector<SampleParams> ManyParams(int draws) {
  std::mt19937_64 random(5);
  std::vector<SampleParams> params;
  for (const float temperature : {0.05f, 0.7f, 1.0f, 30.0f}) {
    for (const int32_t top_k : {0, 1, 7, 100000}) {
      for (const float top_p : {0.0f, 0.3f, 0.9f, 1.0f}) {
        for (int i = 0; i < draws; ++i) params.push_back({temperature, top_k, top_p, random()});
      }
    }
  }
  return params;
}

void ExpectAsSorted(const std::vector<float>& logits, const std::vector<SampleParams>& params) {
  const std::vector<int32_t> tokens = Draw(logits, params);
  for (size_t i = 0; i < params.size(); ++i) {
    const std::vector<int32_t> expected = Expected(logits, params[i]);
    EXPECT_NE(std::find(expected.begin(), expected.end(), tokens[i]), expected.end())
        << tokens[i] << " at temperature " << params[i].temperature << ", top_k " << params[i].top_k
        << ", top_p " << params[i].top_p << ", random " << params[i].random;
  }
}

TEST(Sample, DrawsAsIfSorted) {
  for (const int vocab : {1, 2, 33, 1000, 5003}) {
    SCOPED_TRACE(vocab);
    ExpectAsSorted(RandomFloats(vocab, 3 + vocab, 3.0f), ManyParams(1));
  }
}

TEST(Sample, LargeVocabulary) {
  std::vector<SampleParams> params = {
      {0.8f, 0, 0.95f, 12345}, {0.8f, 50, 0.95f, ~0ull}, {2.0f, 0, 1.0f, 1ull << 63}, {0, 0, 1, 0}};
  ExpectAsSorted(RandomFloats(128256, 9, 3.0f), {params[0], params[1], params[2]});
  const std::vector<float> logits = RandomFloats(128256, 9, 3.0f);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  EXPECT_EQ(Draw(logits, {params[3]})[0], best);
}

// Equal logits are kept by id, and drawn evenly.
TEST(Sample, Ties) {
  constexpr int32_t kBest = 1777;
  std::vector<float> logits(4000, 1.0f);
  logits[kBest] = 2.0f;
  for (int32_t top_k : {1, 2, 40, 1700, 2500}) {
    std::vector<SampleParams> params;
    for (uint64_t i = 0; i < 64; ++i) params.push_back({3.0f, top_k, 1.0f, i << 58});
    params.push_back({3.0f, top_k, 1.0f, ~0ull});
    const std::vector<int32_t> tokens = Draw(logits, params);
    const int32_t end = top_k > kBest ? top_k : top_k - 1;  // of the others that are kept
    for (const int32_t token : tokens) EXPECT_TRUE(token == kBest || token < end) << token;
    EXPECT_EQ(tokens.back(), std::max(kBest, end - 1));
    EXPECT_TRUE(std::is_sorted(tokens.begin(), tokens.end()));
  }
}

TEST(Sample, NumbersThatAreNone) {
  const std::vector<SampleParams> params = ManyParams(1);
  for (const auto& logits :
       {std::vector<float>{kNan, 1.0f, kNan, 3.0f, -kInfinity},
        std::vector<float>{0, kInfinity, 5, kInfinity},
        std::vector<float>{-kInfinity, -kInfinity, kNan}, std::vector<float>{kNan, -kInfinity},
        std::vector<float>{kNan, kNan}, std::vector<float>{0.0f, -0.0f, 0.0f}}) {
    ExpectAsSorted(logits, params);
  }
  const SampleParams greedy;
  EXPECT_EQ(Draw({kNan, -5, kNan, -4, -4}, {greedy})[0], 3);
  EXPECT_EQ(Draw({kNan, -kInfinity}, {greedy})[0], 0);
  EXPECT_EQ(Draw({-1.0f, -0.0f, 0.0f}, {greedy})[0], 1);
  EXPECT_EQ(Draw({1, kInfinity, kInfinity}, {greedy})[0], 1);
  EXPECT_EQ(Draw({kNan, kNan}, {greedy})[0], 0);
  // A temperature that is no number is none.
  EXPECT_EQ(Draw({1, 2, 3}, {{kNan, 0, 1, 7}})[0], 2);
}

}  // namespace
}  // namespace ternion::kernels
