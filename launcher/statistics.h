// Statistics of next-token distributions: how far one is from another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

namespace ternion::launcher {

// ln(sum(e^x)), in double; x is not empty.
double LogSumExp(std::span<const float> logits);

// Kullback-Leibler divergence of softmax(logits) from softmax(reference), nats, at least 0. Both
// have the same size; the log sums are theirs. NaN when a logit is not finite.
double KlDivergence(std::span<const float> reference, double reference_log_sum,
                    std::span<const float> logits, double log_sum);

// The smallest value that `share` of all values, in (0, 1], do not exceed. values: not empty, no
// NaN
template <typename T>
T Percentile(std::vector<T> values, double share) {
  const size_t rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
  const auto at = values.begin() + static_cast<int64_t>(std::max<size_t>(rank, 1) - 1);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

}  // namespace ternion::launcher
