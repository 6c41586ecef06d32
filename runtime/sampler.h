// From logits to the next token.
#pragma once

#include <cstdint>
#include <span>

namespace ternion::runtime {

struct SamplingParams {
  float temperature = 0;  // 0: greedy
  int32_t top_k = 0;      // 0: all
  float top_p = 1;        // smallest set of tokens with at least this probability
  uint64_t seed = 0;
};

// The next token. Greedy takes the largest logit, the lower id on ties. Otherwise the draw depends
// on the logits, the parameters and `position` alone, never on what else is in the batch. NaN
// logits count as minus infinity.
int32_t SampleToken(std::span<const float> logits, const SamplingParams& params, int64_t position);

// -ln softmax(logits)[target], summed in double.
double NegativeLogLikelihood(std::span<const float> logits, int32_t target);

}  // namespace ternion::runtime
