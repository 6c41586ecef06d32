// The gate: softmax over experts and the choice of k.
#pragma once

#include "kernels/cpu/float_ops_common.inc.h"

namespace ternion::kernels {
namespace {

// out = softmax(logits), n elements.
inline void Softmax(const float* logits, int n, float* out) {
  const float lowest = -__builtin_inff();
  F32x16 top = Set1(lowest);
  ForEachVector(n, [&](int64_t i, int64_t count) {
    top = Max(FirstN(LoadN(logits + i, count), count, Set1(lowest)), top);
  });
  const F32x16 largest = Set1(MaxLane(top));
  F32x16 sum = Zero();
  ForEachVector(n, [&](int64_t i, int64_t count) {
    const F32x16 e = FirstN(Exp(LoadN(logits + i, count) - largest), count, Zero());
    sum = sum + e;
    StoreN(e, out + i, count);
  });
  const F32x16 total = Set1(Sum(sum));
  ForEachVector(
      n, [&](int64_t i, int64_t count) { StoreN(LoadN(out + i, count) / total, out + i, count); });
}

// Keeps the k largest in descending order; an equal one that comes later stays behind. With NaN the
// order is unspecified, but the ids are distinct and in range.
inline void TopK(const float* values, int n, int k, int32_t* ids, float* top) {
  for (int i = 0; i < n; ++i) {
    if (i >= k && !(values[i] > top[k - 1])) continue;
    int at = i < k ? i : k - 1;
    for (; at > 0 && values[i] > top[at - 1]; --at) {
      top[at] = top[at - 1];
      ids[at] = ids[at - 1];
    }
    top[at] = values[i];
    ids[at] = i;
  }
}

void GateTopK(const GateTopKArgs& args, Executor& executor) {
  const int64_t work = 8 * int64_t{args.num_experts};
  const auto body = [&](int64_t begin, int64_t end, int thread) {
    float* probabilities = reinterpret_cast<float*>(executor.threads->scratch(thread));
    for (int64_t row = begin; row < end; ++row) {
      int32_t* ids = args.ids + row * args.k;
      float* weights = args.weights + row * args.k;
      Softmax(args.logits + row * args.num_experts, args.num_experts, probabilities);
      TopK(probabilities, args.num_experts, args.k, ids, weights);
      if (!args.renormalize) continue;
      F32x16 sum = Zero();
      ForEachVector(args.k, [&](int64_t i, int64_t n) { sum = sum + LoadN(weights + i, n); });
      const F32x16 total = Set1(Sum(sum));
      ForEachVector(args.k, [&](int64_t i, int64_t n) {
        StoreN(LoadN(weights + i, n) / total, weights + i, n);
      });
    }
  };
  executor.threads->ParallelFor(args.num_rows, MinUnits(work), body);
}

}  // namespace
}  // namespace ternion::kernels
