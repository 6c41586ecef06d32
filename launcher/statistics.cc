#include "launcher/statistics.h"

#include <algorithm>
#include <cmath>

namespace ternion::launcher {

double LogSumExp(std::span<const float> logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return largest + std::log(sum);
}

double KlDivergence(std::span<const float> reference, double reference_log_sum,
                    std::span<const float> logits, double log_sum) {
  double kl = log_sum - reference_log_sum;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double difference = static_cast<double>(reference[i]) - logits[i];
    if (difference != 0) kl += std::exp(reference[i] - reference_log_sum) * difference;
  }
  return kl < 0 ? 0 : kl;  // rounding alone makes it negative; NaN stays
}

}  // namespace ternion::launcher
