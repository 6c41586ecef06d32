// What the float ops share: walking a row in vectors, and how much work is worth a second thread.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/kernels.h"

namespace ternion::kernels {
namespace {

// For steps of loops that keep arrays of sums in registers: an array that is passed to a call, even
// one that is inlined later, stays in memory.
#define TERNION_INLINE inline __attribute__((always_inline))

// f(begin, count) for each 16 of n elements in ascending order; the last count may be smaller.
template <typename F>
inline void ForEachVector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, int64_t{kLanes});
  if (i < n) f(i, n - i);
}

// For ThreadPool::ParallelFor over units that cost `work` multiplications or loads each: a thread
// must get some 10 us of them, or waking it costs more than it saves.
inline int64_t MinUnits(int64_t work) {
  constexpr int64_t kMinWork = 32 * 1024;
  return kMinWork / (work + 1) + 1;
}

// How codes of a KV page lie (kernels/kv_page.h).
template <KvFormat kFormat>
constexpr int kBitsOf = KvBits(kFormat);
// Whether in words of eight.
template <KvFormat kFormat>
constexpr bool kPacked = kBitsOf<kFormat> < 8;
constexpr int kWordCodes = 8;
// Bytes of sixteen words, and of all tokens' values of 16 elements.
template <KvFormat kFormat>
constexpr int64_t kWordsBytes = int64_t{kLanes} * kBitsOf<kFormat>;
template <KvFormat kFormat>
constexpr int64_t kValueBlockBytes = kPageTokens / kWordCodes* kWordsBytes<kFormat>;

}  // namespace
}  // namespace ternion::kernels
