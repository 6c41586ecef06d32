#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/random.h"

namespace ternion::runtime {

kernels::SampleParams ParamsAt(const SamplingParams& params, int64_t position) {
  return {.temperature = params.temperature,
          .top_k = params.top_k,
          .top_p = params.top_p,
          .random = base::RandomBits(params.seed, static_cast<uint64_t>(position))};
}

double NegativeLogLikelihood(std::span<const float> logits, int32_t target) {
  double highest = -INFINITY;
  for (const float logit : logits) highest = logit > highest ? logit : highest;
  double total = 0;
  for (const float logit : logits) total += std::exp(logit - highest);
  return std::log(total) + highest - logits[target];
}

}  // namespace ternion::runtime
