// Ops that walk rows once: norms, quantization, activations, copies.
#pragma once

#include <algorithm>

#include "kernels/cpu/float_ops_common.inc.h"
#include "kernels/cpu/simd_narrow.h"

namespace ternion::kernels {
namespace {

// body(row) for every row, split over threads; a row costs about `work` element operations.
template <typename F>
inline void ForEachRow(int64_t num_rows, int64_t work, Executor& executor, F body) {
  executor.threads->ParallelFor(num_rows, MinUnits(work), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// The sum of value(begin, count), 16 elements each, in 64 lanes; those behind count are 0.
template <typename F>
inline float SumOfRow(int64_t dim, F value) {
  constexpr int kVectors = 4;
  F32x16 sums[kVectors] = {Zero(), Zero(), Zero(), Zero()};
  int64_t i = 0;
  for (; i + kVectors * kLanes <= dim; i += kVectors * kLanes) {
    for (int v = 0; v < kVectors; ++v) sums[v] = sums[v] + value(i + v * kLanes, int64_t{kLanes});
  }
  for (int v = 0; i < dim; ++v, i += kLanes) {
    sums[v] = sums[v] + value(i, std::min<int64_t>(kLanes, dim - i));
  }
  return Sum((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

inline float InverseRms(const float* x, int64_t dim, float eps) {
  const float squares = SumOfRow(dim, [&](int64_t i, int64_t n) {
    const F32x16 v = LoadN(x + i, n);
    return v * v;
  });
  return 1.0f / Sqrt(squares / static_cast<float>(dim) + eps);
}

// `out` may be x.
inline void NormRow(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  const F32x16 scale = Set1(InverseRms(x, dim, eps));
  ForEachVector(dim, [&](int64_t i, int64_t n) {
    StoreN(LoadN(x + i, n) * scale * LoadN(weight + i, n), out + i, n);
  });
}

void RmsNorm(const RmsNormArgs& args, Executor& executor) {
  ForEachRow(args.num_rows, args.dim, executor, [&](int64_t row) {
    NormRow(args.x + row * args.x_stride, args.weight, args.dim, args.eps,
            args.out + row * args.out_stride);
  });
}

// NaN passes through both, so that a broken row shows.
inline F32x16 Relu2(const F32x16& x) {
  const F32x16 positive = Max(Zero(), x);
  return positive * positive;
}
// 0 where x <= 0, even if y is NaN there. The smallest float is the first above 0.
inline F32x16 Relu2Times(const F32x16& x, const F32x16& y) {
  constexpr float kSmallest = 1.40129846e-45f;
  return IfLess(x, Set1(kSmallest), Zero(), Relu2(x) * y);
}
inline F32x16 Silu(const F32x16& x) { return x / (Set1(1.0f) + Exp(Zero() - x)); }

inline void JoinRow(Join join, const float* x, const float* y, int64_t dim, float* joined) {
  const auto with = [&](auto op) {
    ForEachVector(dim, [&](int64_t i, int64_t n) {
      StoreN(op(LoadN(x + i, n), LoadN(y + i, n)), joined + i, n);
    });
  };
  switch (join) {
    case Join::kNothing:
      return;
    case Join::kAdd:
      return with([](const F32x16& a, const F32x16& b) { return a + b; });
    case Join::kSiluTimes:
      return with([](const F32x16& a, const F32x16& b) { return Silu(a) * b; });
    case Join::kRelu2Times:
      return with([](const F32x16& a, const F32x16& b) { return Relu2Times(a, b); });
  }
}

// A row as it is or normalized, computed anew by each pass: cheaper than storing it between passes.
struct RowValues {
  const float* x;
  const float* weight;  // null: as it is
  F32x16 inverse_rms;

  F32x16 operator()(int64_t i, int64_t n) const {
    const F32x16 v = LoadN(x + i, n);
    return weight == nullptr ? v : v * inverse_rms * LoadN(weight + i, n);
  }
};

// Writes codes code_of(value) and their sum. Pads are zeroed; float sums of codes are exact.
template <typename F>
inline void StoreCodes(const RowValues& values, const QuantizedRows& out, int64_t row,
                       float* normed, F code_of) {
  static_assert(kMaxColumns * 128 <= 1 << 24);
  int8_t* codes = out.codes + row * out.stride;
  F32x16 sum = Zero();
  ForEachVector(out.dim, [&](int64_t i, int64_t n) {
    const F32x16 value = values(i, n);
    const F32x16 code = FirstN(code_of(value), n, Zero());
    sum = sum + code;
    StoreI8(code, codes + i);
    if (normed != nullptr) StoreN(value, normed + i, n);
  });
  const int64_t written = base::RoundUp(out.dim, kLanes);
  std::memset(codes + written, 0, static_cast<size_t>(out.stride - written));
  out.sums[row] = static_cast<int32_t>(Sum(sum));
}

// NaN becomes `low`: a row that holds one is lost, but its codes are in range.
inline F32x16 RoundWithin(const F32x16& x, float low, float high) {
  return Round(Min(Max(x, Set1(low)), Set1(high)));
}

// A threshold that the k largest of dim floats >= 0 reach, with all that equal the least of them,
// and no others (1 <= k <= dim); `largest` is no less than any. Floats >= 0 are ordered like their
// bits: these are bisected. A NaN counts as reaching everything.
inline float TopThreshold(const float* x, int64_t dim, int64_t k, float largest) {
  static_assert(kMaxColumns <= 1 << 24);  // counts are exact floats
  uint32_t low = 0, high;
  std::memcpy(&high, &largest, sizeof(high));
  float threshold = 0;
  for (++high; high - low > 1;) {  // at least k reach low, fewer than k reach high
    const uint32_t middle = low + (high - low) / 2;
    float candidate;
    std::memcpy(&candidate, &middle, sizeof(candidate));
    F32x16 count = Zero();
    ForEachVector(dim, [&](int64_t i, int64_t n) {
      const F32x16 reach = IfLess(LoadN(x + i, n), Set1(candidate), Zero(), Set1(1.0f));
      count = count + FirstN(reach, n, Zero());
    });
    const int64_t reached = static_cast<int64_t>(Sum(count));
    if (reached < k) {
      high = middle;
      continue;
    }
    low = middle;
    threshold = candidate;
    if (reached == k) break;
  }
  return threshold;
}

// `magnitudes`: null, or room for dim floats; then only the larger half is kept.
inline void QuantizeRow8(const RowValues& values, const QuantizedRows& out, int64_t row,
                         float* normed, float* magnitudes) {
  F32x16 largest = Set1(1e-5f);
  ForEachVector(out.dim, [&](int64_t i, int64_t n) {
    const F32x16 magnitude = Abs(values(i, n));
    if (magnitudes != nullptr) StoreN(magnitude, magnitudes + i, n);
    largest = Max(magnitude, largest);
  });
  const float absmax = MaxLane(largest);
  const F32x16 scale = Set1(127.0f / absmax);
  out.scales[row] = absmax / 127.0f;
  const auto code_of = [&](const F32x16& v) { return RoundWithin(v * scale, -128.0f, 127.0f); };
  if (magnitudes == nullptr) return StoreCodes(values, out, row, normed, code_of);
  const F32x16 least = Set1(TopThreshold(magnitudes, out.dim, out.dim - out.dim / 2, absmax));
  StoreCodes(values, out, row, normed,
             [&](const F32x16& v) { return IfLess(Abs(v), least, Zero(), code_of(v)); });
}

inline void QuantizeRow4(const RowValues& values, const QuantizedRows& out, int64_t row,
                         float* normed) {
  constexpr float kSqrt7 = 2.6457513f;
  const float sum = SumOfRow(out.dim, [&](int64_t i, int64_t n) { return Abs(values(i, n)); });
  const float mean = sum / static_cast<float>(out.dim);
  const F32x16 divisor = Set1(mean + 1e-5f);
  out.scales[row] = mean / kSqrt7;
  StoreCodes(values, out, row, normed,
             [&](const F32x16& v) { return RoundWithin(Set1(kSqrt7) * v / divisor, -8.0f, 7.0f); });
}

void Quantize(const QuantizeArgs& args, Executor& executor) {
  static_assert(kMaxColumns * sizeof(float) <= base::kScratchBytesPerThread);
  const int64_t dim = args.out.dim;
  const auto quantize = [&](int64_t row, int thread) {
    const int64_t at = row * args.x_stride;
    const float* x = args.x + at;
    if (args.join != Join::kNothing) {
      JoinRow(args.join, x, args.y + at, dim, args.joined + at);
      x = args.joined + at;
    }
    RowValues values = {x, args.weight, Zero()};
    if (args.weight != nullptr) values.inverse_rms = Set1(InverseRms(values.x, dim, args.eps));
    float* normed = args.normed == nullptr ? nullptr : args.normed + row * dim;
    if (args.bits == 4) {
      QuantizeRow4(values, args.out, row, normed);
    } else {
      float* scratch = reinterpret_cast<float*>(executor.threads->scratch(thread));
      QuantizeRow8(values, args.out, row, normed, args.top_half ? scratch : nullptr);
    }
  };
  const int64_t work = (args.top_half ? 20 : args.join == Join::kNothing ? 2 : 6) * dim;
  executor.threads->ParallelFor(args.out.num_rows, MinUnits(work),
                                [&](int64_t begin, int64_t end, int thread) {
                                  for (int64_t row = begin; row < end; ++row) quantize(row, thread);
                                });
}

// Copies n codes, filled up with zeros to a multiple of 16. Returns their sum.
inline int32_t CopyCodes(const int8_t* in, int64_t n, int8_t* out) {
  ByteSum sum;
  ForEachVector(n, [&](int64_t i, int64_t count) {
    const I8x16 codes = LoadBytesN(in + i, count);
    StoreBytes(codes, out + i);
    sum.Add(codes);
  });
  return sum.Total();
}

void GatherRows(const GatherRowsArgs& args, Executor& executor) {
  const QuantizedRows& out = args.out;
  const int64_t written = base::RoundUp(out.dim, kLanes);
  ForEachRow(out.num_rows, out.dim / 8, executor, [&](int64_t row) {
    int8_t* codes = out.codes + row * out.stride;
    out.sums[row] = CopyCodes(args.rows[row], out.dim, codes);
    std::memset(codes + written, 0, static_cast<size_t>(out.stride - written));
    out.scales[row] = args.scales[row];
  });
}

void WeightedSum(const WeightedSumArgs& args, Executor& executor) {
  const int64_t terms = args.num_rows == 0 ? 0 : args.begin[args.num_rows] / args.num_rows;
  ForEachRow(args.num_rows, args.dim * (terms + 1), executor, [&](int64_t row) {
    float* out = args.out + row * args.dim;
    ForEachVector(args.dim, [&](int64_t i, int64_t n) {
      F32x16 sum = args.accumulate ? LoadN(out + i, n) : Zero();
      for (int32_t j = args.begin[row]; j < args.begin[row + 1]; ++j) {
        const F32x16 term = LoadN(args.terms[j] + i, n);
        sum = sum + (args.weights == nullptr ? term : Set1(args.weights[j]) * term);
      }
      StoreN(sum, out + i, n);
    });
  });
}

void ZeroOut(const ZeroArgs& args, Executor&) {
  if (args.count > 0) std::memset(args.out, 0, static_cast<size_t>(args.count) * sizeof(float));
}

void Embed(const EmbedArgs& args, Executor& executor) {
  const int64_t dim = args.table.columns;
  ForEachRow(args.num_rows, dim, executor, [&](int64_t row) {
    const int64_t first = args.ids[row] * dim;
    float* out = args.out + row * dim;
    if (args.table.type == DenseType::kBf16) {
      const uint16_t* in = static_cast<const uint16_t*>(args.table.data) + first;
      ForEachVector(dim, [&](int64_t i, int64_t n) { StoreN(LoadBf16N(in + i, n), out + i, n); });
    } else {
      const float* in = static_cast<const float*>(args.table.data) + first;
      std::memcpy(out, in, static_cast<size_t>(dim) * sizeof(float));
    }
  });
}

inline void RopeRow(const RopeHeads& heads, const RopeArgs& args, int64_t row) {
  const int64_t half = args.head_dim / 2;
  const float* cosines = args.cos_table + args.positions[row] * half;
  const float* sines = args.sin_table + args.positions[row] * half;
  for (int head = 0; head < heads.heads; ++head) {
    float* x = heads.x + row * heads.stride + int64_t{head} * args.head_dim;
    if (heads.norm != nullptr) NormRow(x, heads.norm, args.head_dim, args.eps, x);
    ForEachVector(half, [&](int64_t i, int64_t n) {
      const F32x16 a = LoadN(x + i, n);
      const F32x16 b = LoadN(x + half + i, n);
      const F32x16 cosine = LoadN(cosines + i, n);
      const F32x16 sine = LoadN(sines + i, n);
      StoreN(a * cosine - b * sine, x + i, n);
      StoreN(b * cosine + a * sine, x + half + i, n);
    });
  }
}

void Rope(const RopeArgs& args, Executor& executor) {
  const int64_t heads = args.q.heads + args.k.heads;
  ForEachRow(args.num_rows, heads * args.head_dim, executor, [&](int64_t row) {
    RopeRow(args.q, args, row);
    RopeRow(args.k, args, row);
  });
}

}  // namespace
}  // namespace ternion::kernels
