// How a sequence's tokens are drawn, and how well logits foretell one.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/kernels.h"

namespace ternion::runtime {

struct SamplingParams {
  float temperature = 0;  // 0: greedy
  int32_t top_k = 0;      // 0: all
  float top_p = 1;        // smallest set of tokens with at least this probability
  uint64_t seed = 0;
};

// For the token that follows `position`: besides the logits, the draw depends on the parameters and
// the position alone, never on what else is in the batch.
kernels::SampleParams ParamsAt(const SamplingParams& params, int64_t position);

// -ln softmax(logits)[target], summed in double.
double NegativeLogLikelihood(std::span<const float> logits, int32_t target);

}  // namespace ternion::runtime
