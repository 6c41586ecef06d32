// Narrow numbers (bf16, int8, nibbles) <-> sixteen floats: the same bytes on every instruction set,
// as in simd.h. Memory may have any alignment, and none past the named elements is touched.
#pragma once

#include "kernels/cpu/simd.h"

namespace ternion::kernels {
namespace {

// Sixteen int8. Their operations are those of SSE2, which every x86-64 has.
struct I8x16 {
  __m128i v;
};

// Per instruction set below:
//   LowBytes(a)       the lowest 8 bits of each float's bits
//   Widen(a)          int8 as floats
//   StoreLowNibbles   the lowest 4 bits of each float's bits as 8 bytes, the first in the low half
//   StoreBf16         rounded to nearest even; NaN stays NaN

// One float, likewise.
inline uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t quiet_nan = bits >> 16 | 0x40;
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

#if defined(__AVX512F__)

inline I8x16 LowBytes(F32x16 a) { return {_mm512_cvtepi32_epi8(_mm512_castps_si512(a.v))}; }
inline F32x16 Widen(I8x16 a) { return WidenI8(a.v); }
inline void StoreLowNibbles(F32x16 a, void* p) {
  const __m512i even = _mm512_castps_si512(a.v);  // of each pair; the odd one stands above it
  const __m512i odd = _mm512_srli_epi64(even, 28);
  const __m512i low = _mm512_set1_epi64(15);
  const __m512i joined = _mm512_ternarylogic_epi64(low, even, odd, 0xca);  // low ? even : odd
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm512_cvtepi64_epi8(joined));
}
inline void StoreBf16(F32x16 a, void* p) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i bf16 = _mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16));
}

#elif defined(__AVX2__)

inline I8x16 LowBytes(F32x16 a) {
  const __m256i mask = _mm256_set1_epi32(255);
  const __m256i lo = _mm256_and_si256(_mm256_castps_si256(a.lo), mask);
  const __m256i hi = _mm256_and_si256(_mm256_castps_si256(a.hi), mask);
  const __m256i words = _mm256_packus_epi32(lo, hi);  // lanes 0-3, 8-11, 4-7, 12-15
  const __m256i ordered = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
  return {_mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1))};
}
inline F32x16 Widen(I8x16 a) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a.v)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(a.v, a.v)))};
}
inline __m256i ToBf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet_nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
}
inline void StoreBf16(F32x16 a, void* p) {
  const __m256i words = _mm256_packus_epi32(ToBf16(a.lo), ToBf16(a.hi));
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0)));
}

#else  // any x86-64

inline I8x16 LowBytes(const F32x16& a) {
  __m128i quarters[4];
  std::memcpy(quarters, a.v, sizeof(quarters));
  for (__m128i& quarter : quarters) quarter = _mm_and_si128(quarter, _mm_set1_epi32(255));
  return {_mm_packus_epi16(_mm_packs_epi32(quarters[0], quarters[1]),
                           _mm_packs_epi32(quarters[2], quarters[3]))};
}
inline F32x16 Widen(I8x16 a) {
  // Each byte moves to the top of its word, whose shift then extends the sign.
  const __m128i zero = _mm_setzero_si128();
  const __m128i lo = _mm_unpacklo_epi8(zero, a.v), hi = _mm_unpackhi_epi8(zero, a.v);
  const __m128i quarters[] = {_mm_unpacklo_epi16(zero, lo), _mm_unpackhi_epi16(zero, lo),
                              _mm_unpacklo_epi16(zero, hi), _mm_unpackhi_epi16(zero, hi)};
  F32x16 result;
  for (int q = 0; q < 4; ++q) {
    _mm_storeu_ps(result.v + 4 * q, _mm_cvtepi32_ps(_mm_srai_epi32(quarters[q], 24)));
  }
  return result;
}
inline void StoreBf16(const F32x16& a, void* p) {
  uint16_t bf16[kLanes];
#pragma GCC unroll 1
  for (int l = 0; l < kLanes; ++l) bf16[l] = ToBf16(a.v[l]);
  std::memcpy(p, bf16, sizeof(bf16));
}

#endif

// The rest is the same text for all of them.

inline I8x16 LoadBytes(const void* p) { return {_mm_loadu_si128(static_cast<const __m128i*>(p))}; }
inline void StoreBytes(I8x16 a, void* p) { _mm_storeu_si128(static_cast<__m128i*>(p), a.v); }

// (nibble ^ 8) - 8 extends the sign of four bits; the other four of each byte are ignored.
inline __m128i SignedNibbles(__m128i a) {
  const __m128i eight = _mm_set1_epi8(8);
  return _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(a, _mm_set1_epi8(15)), eight), eight);
}
// In each 16 bits: the low byte's nibble and, above it, the high byte's.
inline __m128i JoinNibbles(__m128i a) {
  const __m128i even = _mm_and_si128(a, _mm_set1_epi16(0x0f));
  const __m128i odd = _mm_and_si128(_mm_srli_epi16(a, 4), _mm_set1_epi16(0xf0));
  return _mm_or_si128(even, odd);
}

// Sixteen nibbles of 8 bytes, the first in the low half, as -8 .. 7. The inverse stores the lowest
// 4 bits of each lane.
inline I8x16 LoadNibbles(const void* p) {
  const __m128i packed = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return {SignedNibbles(_mm_unpacklo_epi8(packed, _mm_srli_epi16(packed, 4)))};
}
inline void StoreNibbles(I8x16 a, void* p) {
  const __m128i pairs = JoinNibbles(a.v);
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}
#if !defined(__AVX512F__)
inline void StoreLowNibbles(const F32x16& a, void* p) { StoreNibbles(LowBytes(a), p); }
#endif

// 32 of them.
inline void UnpackNibbles(const uint8_t* packed, int8_t* codes) {
  const __m128i bytes = LoadBytes(packed).v;
  const __m128i even = SignedNibbles(bytes), odd = SignedNibbles(_mm_srli_epi16(bytes, 4));
  StoreBytes({_mm_unpacklo_epi8(even, odd)}, codes);
  StoreBytes({_mm_unpackhi_epi8(even, odd)}, codes + kLanes);
}
inline void PackNibbles(const int8_t* codes, uint8_t* packed) {
  const __m128i low = JoinNibbles(LoadBytes(codes).v);
  const __m128i high = JoinNibbles(LoadBytes(codes + kLanes).v);
  StoreBytes({_mm_packus_epi16(low, high)}, packed);
}

// Sum of many int8, taken as bytes 0 .. 255 on the way: one instruction adds eight of these.
struct ByteSum {
  __m128i halves = _mm_setzero_si128();
  int64_t vectors = 0;

  void Add(I8x16 a) {
    const __m128i bytes = _mm_xor_si128(a.v, _mm_set1_epi8(-128));
    halves = _mm_add_epi64(halves, _mm_sad_epu8(bytes, _mm_setzero_si128()));
    ++vectors;
  }
  int32_t Total() const {
    const __m128i sum = _mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves));
    return static_cast<int32_t>(_mm_cvtsi128_si64(sum) - vectors * 128 * kLanes);
  }
};

// The first n (0 <= n <= 16), through a padded vector. Loads fill up with zeros.
inline I8x16 LoadBytesN(const void* p, int64_t n) {
  if (n == kLanes) return LoadBytes(p);
  uint8_t padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n));
  return LoadBytes(padded);
}
inline void StoreBytesN(I8x16 a, void* p, int64_t n) {
  if (n == kLanes) return StoreBytes(a, p);
  uint8_t padded[kLanes];
  StoreBytes(a, padded);
  std::memcpy(p, padded, static_cast<size_t>(n));
}
inline I8x16 LoadNibblesN(const void* p, int64_t n) {
  if (n == kLanes) return LoadNibbles(p);
  uint8_t padded[kLanes / 2] = {};
  std::memcpy(padded, p, static_cast<size_t>((n + 1) / 2));
  return LoadNibbles(padded);
}
inline void StoreNibblesN(I8x16 a, void* p, int64_t n) {
  if (n == kLanes) return StoreNibbles(a, p);
  uint8_t padded[kLanes / 2];
  StoreNibbles(a, padded);
  std::memcpy(p, padded, static_cast<size_t>((n + 1) / 2));
}
inline void StoreBf16N(const F32x16& a, void* p, int64_t n) {
  if (n == kLanes) return StoreBf16(a, p);
  uint8_t padded[2 * kLanes];
  StoreBf16(a, padded);
  std::memcpy(p, padded, static_cast<size_t>(2 * n));
}

}  // namespace
}  // namespace ternion::kernels
