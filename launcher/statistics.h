// Statistics of next-token distributions: how far one is from another.
#pragma once

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
double Percentile(std::vector<float> values, double share);

}  // namespace ternion::launcher
