// Writing keys and values into the pages of the KV cache, and the rotation before it.
#pragma once

#include "kernels/cpu/float_ops_common.inc.h"
#include "kernels/cpu/float_ops_rows.inc.h"
#include "kernels/cpu/simd_narrow.h"

namespace ternion::kernels {
namespace {

// Every lane's sum with, and (in the upper lanes) difference from, the lane at kDistance.
template <int kDistance>
inline F32x16 PairLanes(const F32x16& a) {
  alignas(64) float signs[kLanes];
  for (int l = 0; l < kLanes; ++l) signs[l] = (l & kDistance) != 0 ? -1.0f : 1.0f;
  return SwapLanes<kDistance>(a) + a * Load(signs);
}

// One head. Distances below 16 lie within a vector.
inline void Rotate(float* x, int head_dim, const F32x16& scale) {
  ForEachVector(head_dim, [&](int64_t i, int64_t n) {
    F32x16 a = LoadN(x + i, n) * scale;
    if (head_dim > 1) a = PairLanes<1>(a);
    if (head_dim > 2) a = PairLanes<2>(a);
    if (head_dim > 4) a = PairLanes<4>(a);
    if (head_dim > 8) a = PairLanes<8>(a);
    StoreN(a, x + i, n);
  });
  for (int distance = kLanes; distance < head_dim; distance *= 2) {
    for (int i = 0; i < head_dim; i += kLanes) {
      if ((i & distance) != 0) continue;
      const F32x16 a = Load(x + i), b = Load(x + i + distance);
      Store(a + b, x + i);
      Store(a - b, x + i + distance);
    }
  }
}

void Hadamard(const HadamardArgs& args, Executor& executor) {
  const F32x16 scale = Set1(1.0f / Sqrt(static_cast<float>(args.head_dim)));
  ForEachRow(args.num_rows, int64_t{4} * args.heads * args.head_dim, executor, [&](int64_t row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      Rotate(args.x + row * args.stride + head * args.head_dim, args.head_dim, scale);
    }
  });
}

// Calls write(element, code) for each element of one head: code in -127 .. 127 at 8 bits, else 0 ..
// 2^kBits - 1. Returns what one step is worth.
template <int kBits, typename F>
inline float QuantizeHead(const float* x, int head_dim, F write) {
  constexpr bool kMidRise = kBits < 8;
  constexpr float kLevels = kMidRise ? 1 << (kBits - 1) : 127;
  F32x16 largest = Set1(1e-5f);
  ForEachVector(head_dim,
                [&](int64_t i, int64_t n) { largest = Max(Abs(LoadN(x + i, n)), largest); });
  const float absmax = MaxLane(largest);
  const F32x16 scale = Set1(kLevels / absmax);
  ForEachVector(head_dim, [&](int64_t i, int64_t n) {
    const F32x16 scaled = LoadN(x + i, n) * scale;
    int8_t codes[kLanes];
    if constexpr (kMidRise) {
      const F32x16 within = Min(Max(scaled, Set1(-kLevels)), Set1(kLevels - 1));
      StoreI8(Floor(within) + Set1(kLevels), codes);
    } else {
      StoreI8(RoundWithin(scaled, -kLevels, kLevels), codes);
    }
    for (int64_t l = 0; l < n; ++l) write(i + l, codes[l]);
  });
  return absmax / kLevels;
}

// Code `field` of the eight in a word. It is written byte by byte: a word of three bytes is no
// register's size, and its next code is soon to be written.
template <int kBits>
inline void SetCode(uint8_t* word, int64_t field, int8_t code) {
  const int64_t bit = field * kBits;
  uint8_t* byte = word + bit / 8;
  const int mask = ((1 << kBits) - 1) << bit % 8;
  const int bits = code << bit % 8;
  byte[0] = static_cast<uint8_t>((byte[0] & ~mask) | bits);
  if (mask > 255) byte[1] = static_cast<uint8_t>((byte[1] & ~(mask >> 8)) | bits >> 8);
}

// One head of one row into its slot of a page: `x` are its keys or its values.
struct HeadSlot {
  const KvPage& page;
  int64_t head;
  int64_t slot;
  int64_t head_dim;
};

inline void StoreKeysBf16(const HeadSlot& at, const float* x) {
  uint16_t* keys = static_cast<uint16_t*>(at.page.keys) + at.head * at.head_dim * kPageTokens;
  for (int64_t d = 0; d < at.head_dim; ++d) keys[d * kPageTokens + at.slot] = ToBf16(x[d]);
}
inline void StoreValuesBf16(const HeadSlot& at, const float* x) {
  uint16_t* values =
      static_cast<uint16_t*>(at.page.values) + (at.head * kPageTokens + at.slot) * at.head_dim;
  for (int64_t d = 0; d < at.head_dim; ++d) values[d] = ToBf16(x[d]);
}

template <KvFormat kFormat>
inline float StoreKeyCodes(const HeadSlot& at, const float* x) {
  constexpr int kBits = kBitsOf<kFormat>;
  const int dim = static_cast<int>(at.head_dim);
  if constexpr (!kPacked<kFormat>) {
    int8_t* keys = static_cast<int8_t*>(at.page.keys) + at.head * dim * kPageTokens + at.slot;
    return QuantizeHead<8>(x, dim, [&](int64_t d, int8_t code) { keys[d * kPageTokens] = code; });
  } else {
    uint8_t* words =
        static_cast<uint8_t*>(at.page.keys) + (at.head * dim * kLanes + at.slot % kLanes) * kBits;
    return QuantizeHead<kBits>(x, dim, [&](int64_t d, int8_t code) {
      SetCode<kBits>(words + d * kWordsBytes<kFormat>, at.slot / kLanes, code);
    });
  }
}

template <KvFormat kFormat>
inline float StoreValueCodes(const HeadSlot& at, const float* x) {
  constexpr int kBits = kBitsOf<kFormat>;
  const int dim = static_cast<int>(at.head_dim);
  if constexpr (!kPacked<kFormat>) {
    int8_t* values = static_cast<int8_t*>(at.page.values) + (at.head * kPageTokens + at.slot) * dim;
    return QuantizeHead<8>(x, dim, [&](int64_t d, int8_t code) { values[d] = code; });
  } else {
    const int64_t blocks = base::CeilDiv(dim, kLanes);
    uint8_t* words = static_cast<uint8_t*>(at.page.values) +
                     at.head * blocks * kValueBlockBytes<kFormat> +
                     at.slot / kWordCodes * kWordsBytes<kFormat>;
    return QuantizeHead<kBits>(x, dim, [&](int64_t d, int8_t code) {
      SetCode<kBits>(words + d / kLanes * kValueBlockBytes<kFormat> + d % kLanes * kBits,
                     at.slot % kWordCodes, code);
    });
  }
}

// Vectors of a row: the keys of each KV head, then the values of each.
template <KvFormat kFormat>
void StoreVector(const KvStoreArgs& args, int64_t row, int64_t vector) {
  const bool is_key = vector < args.kv_heads;
  const int64_t head = is_key ? vector : vector - args.kv_heads;
  const int64_t position = args.positions[row];
  const KvPage& page = args.pages[row][position / kPageTokens];
  const HeadSlot at = {page, head, position % kPageTokens, args.head_dim};
  const float* x = (is_key ? args.k : args.v) + row * args.stride + head * args.head_dim;
  if constexpr (kFormat == KvFormat::kBf16) {
    is_key ? StoreKeysBf16(at, x) : StoreValuesBf16(at, x);
  } else {
    float& scale = (is_key ? page.key_scales : page.value_scales)[head * kPageTokens + at.slot];
    if (position != 0) {
      scale = is_key ? StoreKeyCodes<kFormat>(at, x) : StoreValueCodes<kFormat>(at, x);
      return;
    }
    uint16_t* first = page.first + vector * args.head_dim;
    for (int d = 0; d < args.head_dim; ++d) first[d] = ToBf16(x[d]);
    scale = 0;
  }
}

template <KvFormat kFormat>
void KvStoreAs(const KvStoreArgs& args, Executor& executor) {
  // Tokens of one sequence share words at int4 and int3, so that a vector's rows stay together.
  constexpr bool kByVector = kPacked<kFormat>;
  const int64_t vectors = int64_t{2} * args.kv_heads;
  const int64_t outer = kByVector ? vectors : args.num_rows;
  const int64_t inner = kByVector ? args.num_rows : vectors;
  const int64_t work = 2 * inner * args.head_dim;
  executor.threads->ParallelFor(outer, MinUnits(work), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < inner; ++j) {
        StoreVector<kFormat>(args, kByVector ? j : i, kByVector ? i : j);
      }
    }
  });
}

void KvStore(const KvStoreArgs& args, Executor& executor) {
  switch (args.format) {
    case KvFormat::kBf16:
      return KvStoreAs<KvFormat::kBf16>(args, executor);
    case KvFormat::kInt8:
      return KvStoreAs<KvFormat::kInt8>(args, executor);
    case KvFormat::kInt4:
      return KvStoreAs<KvFormat::kInt4>(args, executor);
    case KvFormat::kInt3:
      return KvStoreAs<KvFormat::kInt3>(args, executor);
  }
}

}  // namespace
}  // namespace ternion::kernels
