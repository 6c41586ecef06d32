#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/random.h"

namespace ternion::runtime {
namespace {

int32_t ArgMax(std::span<const float> logits) {
  int32_t best = 0;
  float highest = -INFINITY;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] > highest)) continue;
    best = static_cast<int32_t>(i);
    highest = logits[i];
  }
  return best;
}

// Uniform in [0, 1) from (seed, position).
double Uniform(uint64_t seed, int64_t position) {
  return static_cast<double>(base::RandomBits(seed, static_cast<uint64_t>(position)) >> 11) *
         0x1p-53;
}

struct Candidate {
  int32_t token = 0;
  double weight = 0;  // logit, then unnormalized probability
};

// Tokens by descending logit, cut to top_k.
std::vector<Candidate> Candidates(std::span<const float> logits, int32_t top_k) {
  std::vector<Candidate> candidates;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isnan(logits[i])) candidates.push_back({static_cast<int32_t>(i), logits[i]});
  }
  const auto higher = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  };
  if (top_k > 0 && static_cast<size_t>(top_k) < candidates.size()) {
    std::partial_sort(candidates.begin(), candidates.begin() + top_k, candidates.end(), higher);
    candidates.resize(top_k);
  } else {
    std::sort(candidates.begin(), candidates.end(), higher);
  }
  return candidates;
}

}  // namespace

int32_t SampleToken(std::span<const float> logits, const SamplingParams& params, int64_t position) {
  if (params.temperature <= 0) return ArgMax(logits);
  std::vector<Candidate> candidates = Candidates(logits, params.top_k);
  if (candidates.empty()) return 0;
  const double highest = candidates[0].weight;
  double total = 0;
  for (Candidate& candidate : candidates) {
    candidate.weight = std::exp((candidate.weight - highest) / params.temperature);
    total += candidate.weight;
  }
  double kept = 0;
  size_t count = 0;
  while (count < candidates.size() && (count == 0 || kept < params.top_p * total)) {
    kept += candidates[count++].weight;
  }
  double left = Uniform(params.seed, position) * kept;
  for (size_t i = 0; i < count; ++i) {
    left -= candidates[i].weight;
    if (left < 0) return candidates[i].token;
  }
  return candidates[count - 1].token;
}

double NegativeLogLikelihood(std::span<const float> logits, int32_t target) {
  const double highest = logits[ArgMax(logits)];
  double total = 0;
  for (float logit : logits) total += std::exp(logit - highest);
  return std::log(total) + highest - logits[target];
}

}  // namespace ternion::runtime
