// Sixteen floats and the operations the float ops are written in, once per instruction set.
//
// Which set is decided by the including file's -m flags. The three versions do the same IEEE
// operations in the same order, so that every result is the same bit for bit: no fused
// multiply-add, no approximate reciprocal, and where an instruction's behaviour on NaN shows, the
// scalar version spells it out.
//
// Everything has internal linkage: see kernels/cpu/variants.h.
#pragma once

// GCC 12 takes the deliberately undefined operands inside its intrinsics for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace ternion::kernels {
namespace {

constexpr int kLanes = 16;

// Per instruction set below:
//   F32x16            the vector
//   Set1(x)           x in all lanes
//   Load, LoadN       16 floats; the first n (0 <= n <= 16) and zeros, touching no memory past them
//   LoadBf16(N)       the same from bf16
//   LoadI8(N)         the same from int8
//   Store, StoreN     to memory of any alignment
//   StoreI8           integral lanes in [-128, 127] as 16 bytes
//   + - * /           rounded to nearest even
//   Ratio(a, b, r)    a / b with r = 1.0f / b, fit to be rounded to an integer (see below)
//   Max(a, b)         a > b ? a : b: a NaN on either side gives b
//   Min(a, b)         a < b ? a : b: likewise
//   Abs
//   FirstN(a, n, b)   lanes below n of a, the others of b
//   IfLess(a, b, y, n)  a < b ? y : n
//   CeilBf16(a)       the smallest bf16 not below a >= 0; __builtin_nanf("") stays as it is
//   ShiftExponent     the float whose bits are a's bits + (b's bits << 23)
//   Sum(a)            lanes added pairwise: l and l + 8, then 4, 2, 1
//   MaxLane(a)        the same with Max
//   SwapLanes<d>(a)   lane l is a's lane l ^ d, d of 1, 2, 4, 8
//
//   U32x16            sixteen 32-bit words
//   LoadWords<b>(p)   each of b bytes (3 or 4), lowest byte first; of 3, the upper is unspecified
//   a >> n            every word
//   Magnitude(a)      the bits of |a|: their order is that of |a|, with NaN above infinity
//   Max(a, b)         of words that are magnitudes
//   MaxOfEach(a)      sixteen vectors' largest magnitudes: lane i is a[i]'s, as a float
//   CodeValue<b>(a)   the lowest b bits (3 or 4) of each word as code - 2^(b-1) + 0.5

#if defined(__AVX512F__)

struct F32x16 {
  __m512 v;
};

inline __mmask16 FirstMask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline F32x16 Set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32x16 LoadN(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(FirstMask(n), p)}; }
// Moves each bf16 into the upper half of its float: one permute, where widening and shifting are
// two.
inline F32x16 WidenBf16(__m256i x) {
  const __m512i source = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7,
                                          0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, source, _mm512_castsi256_si512(x)))};
}
inline F32x16 LoadBf16(const void* p) {
  return WidenBf16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline F32x16 LoadBf16N(const void* p, int64_t n) {
  return WidenBf16(_mm256_maskz_loadu_epi16(FirstMask(n), p));
}
inline void Store(F32x16 a, float* p) { _mm512_storeu_ps(p, a.v); }
inline void StoreN(F32x16 a, float* p, int64_t n) { _mm512_mask_storeu_ps(p, FirstMask(n), a.v); }
inline void StoreI8(F32x16 a, int8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 Ratio(F32x16 a, F32x16 b, F32x16 r) {
  const __m512 q = _mm512_mul_ps(a.v, r.v);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(q, b.v, a.v), r.v, q)};
}
inline F32x16 Max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 Min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 Abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline F32x16 FirstN(F32x16 a, int64_t n, F32x16 b) {
  return {_mm512_mask_blend_ps(FirstMask(n), b.v, a.v)};
}
inline F32x16 IfLess(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline F32x16 CeilBf16(F32x16 a) {
  const __m512i above = _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0xffff));
  return {_mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xffff), above))};
}
inline F32x16 ShiftExponent(F32x16 a, F32x16 b) {
  const __m512i shift = _mm512_slli_epi32(_mm512_castps_si512(b.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), shift))};
}
inline __m256 LowHalf(F32x16 a) { return _mm512_castps512_ps256(a.v); }
inline __m256 HighHalf(F32x16 a) { return _mm512_extractf32x8_ps(a.v, 1); }

inline F32x16 WidenI8(__m128i x) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))}; }
inline F32x16 LoadI8(const int8_t* p) {
  return WidenI8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32x16 LoadI8N(const int8_t* p, int64_t n) {
  return WidenI8(_mm_maskz_loadu_epi8(FirstMask(n), p));
}
template <int kDistance>
inline F32x16 SwapLanes(F32x16 a) {
  if constexpr (kDistance == 8) return {_mm512_shuffle_f32x4(a.v, a.v, _MM_SHUFFLE(1, 0, 3, 2))};
  if constexpr (kDistance == 4) return {_mm512_shuffle_f32x4(a.v, a.v, _MM_SHUFFLE(2, 3, 0, 1))};
  if constexpr (kDistance == 2) return {_mm512_permute_ps(a.v, _MM_SHUFFLE(1, 0, 3, 2))};
  if constexpr (kDistance == 1) return {_mm512_permute_ps(a.v, _MM_SHUFFLE(2, 3, 0, 1))};
}

struct U32x16 {
  typedef uint32_t Words __attribute__((vector_size(64)));
  Words v;
};
template <int kBytes>
inline U32x16 LoadWords(const uint8_t* p) {
  if constexpr (kBytes == 4) return {reinterpret_cast<U32x16::Words>(_mm512_loadu_si512(p))};
  // Twelve bytes to each quarter, then three of them to each word.
  const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
  const __m512i spread =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
  const __m512i bytes = _mm512_maskz_loadu_epi32(0x0fff, p);
  return {reinterpret_cast<U32x16::Words>(
      _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, bytes), spread))};
}
inline U32x16 operator>>(U32x16 a, int n) { return {a.v >> n}; }
inline U32x16 Magnitude(F32x16 a) { return {reinterpret_cast<U32x16::Words>(Abs(a).v)}; }
inline U32x16 Max(U32x16 a, U32x16 b) {
  return {reinterpret_cast<U32x16::Words>(
      _mm512_max_epu32(reinterpret_cast<__m512i>(a.v), reinterpret_cast<__m512i>(b.v)))};
}
// Each step halves the words that are left of two vectors and puts them into one.
inline F32x16 MaxOfEach(const U32x16 (&a)[kLanes]) {
  __m512 by8[8], by4[4], by2[2];
  const auto max = [](__m512 x, __m512 y) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
  };
  for (int i = 0; i < 8; ++i) {
    const __m512 x = reinterpret_cast<__m512>(a[i / 4 * 8 + i % 4].v);
    const __m512 y = reinterpret_cast<__m512>(a[i / 4 * 8 + i % 4 + 4].v);
    by8[i] = max(_mm512_shuffle_f32x4(x, y, _MM_SHUFFLE(1, 0, 1, 0)),
                 _mm512_shuffle_f32x4(x, y, _MM_SHUFFLE(3, 2, 3, 2)));
  }
  for (int i = 0; i < 4; ++i) {
    by4[i] = max(_mm512_shuffle_f32x4(by8[i], by8[i + 4], _MM_SHUFFLE(2, 0, 2, 0)),
                 _mm512_shuffle_f32x4(by8[i], by8[i + 4], _MM_SHUFFLE(3, 1, 3, 1)));
  }
  for (int i = 0; i < 2; ++i) {
    by2[i] = max(_mm512_shuffle_ps(by4[2 * i], by4[2 * i + 1], _MM_SHUFFLE(1, 0, 1, 0)),
                 _mm512_shuffle_ps(by4[2 * i], by4[2 * i + 1], _MM_SHUFFLE(3, 2, 3, 2)));
  }
  return {max(_mm512_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(2, 0, 2, 0)),
              _mm512_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(3, 1, 3, 1)))};
}
// A table look-up, which reads four bits of each word: for 3, what the fourth is does not matter.
template <int kBits>
inline F32x16 CodeValue(U32x16 a) {
  constexpr float kHigh = kBits == 4 ? 8.0f : 0.0f;  // of entries 8 .. 15 over 0 .. 7
  constexpr float kLow = 0.5f - (1 << (kBits - 1));
  const __m512 ramp = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, kHigh, kHigh + 1, kHigh + 2, kHigh + 3,
                                     kHigh + 4, kHigh + 5, kHigh + 6, kHigh + 7);
  const __m512 table = _mm512_add_ps(ramp, _mm512_set1_ps(kLow));
  return {_mm512_permutexvar_ps(reinterpret_cast<__m512i>(a.v), table)};
}

#elif defined(__AVX2__)

struct F32x16 {
  __m256 lo, hi;
};

// All bits set in the lanes below n.
inline __m256i FirstMask(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
}

inline F32x16 Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 LoadN(const float* p, int64_t n) {
  if (n == kLanes) return Load(p);
  return {_mm256_maskload_ps(p, FirstMask(n)), _mm256_maskload_ps(p + 8, FirstMask(n - 8))};
}
inline __m256 WidenBf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline F32x16 LoadBf16(const void* p) {
  const __m128i* half = static_cast<const __m128i*>(p);
  return {WidenBf16(_mm_loadu_si128(half)), WidenBf16(_mm_loadu_si128(half + 1))};
}
inline F32x16 LoadBf16N(const void* p, int64_t n) {
  if (n == kLanes) return LoadBf16(p);
  uint16_t padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return LoadBf16(padded);
}
inline void Store(F32x16 a, float* p) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void StoreN(F32x16 a, float* p, int64_t n) {
  if (n == kLanes) return Store(a, p);
  _mm256_maskstore_ps(p, FirstMask(n), a.lo);
  _mm256_maskstore_ps(p + 8, FirstMask(n - 8), a.hi);
}
inline void StoreI8(F32x16 a, int8_t* p) {
  const __m256i lo = _mm256_cvtps_epi32(a.lo);
  const __m256i hi = _mm256_cvtps_epi32(a.hi);
  const __m128i lo16 = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i hi16 = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(lo16, hi16));
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline __m256 Ratio(__m256 a, __m256 b, __m256 r) {
  const __m256 q = _mm256_mul_ps(a, r);
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(q, b, a), r, q);
}
inline F32x16 Ratio(F32x16 a, F32x16 b, F32x16 r) {
  return {Ratio(a.lo, b.lo, r.lo), Ratio(a.hi, b.hi, r.hi)};
}
inline F32x16 Max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F32x16 Min(F32x16 a, F32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline F32x16 Abs(F32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32x16 FirstN(F32x16 a, int64_t n, F32x16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(FirstMask(n))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(FirstMask(n - 8)))};
}
inline F32x16 IfLess(F32x16 a, F32x16 b, F32x16 yes, F32x16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline __m256 CeilBf16(__m256 a) {
  const __m256i above = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(0xffff));
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_set1_epi32(0xffff), above));
}
inline F32x16 CeilBf16(F32x16 a) { return {CeilBf16(a.lo), CeilBf16(a.hi)}; }
inline __m256 ShiftExponent(__m256 a, __m256 b) {
  const __m256i shift = _mm256_slli_epi32(_mm256_castps_si256(b), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shift));
}
inline F32x16 ShiftExponent(F32x16 a, F32x16 b) {
  return {ShiftExponent(a.lo, b.lo), ShiftExponent(a.hi, b.hi)};
}
inline __m256 LowHalf(F32x16 a) { return a.lo; }
inline __m256 HighHalf(F32x16 a) { return a.hi; }

inline F32x16 LoadI8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline F32x16 LoadI8N(const int8_t* p, int64_t n) {
  if (n == kLanes) return LoadI8(p);
  int8_t padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n));
  return LoadI8(padded);
}
template <int kDistance>
inline F32x16 SwapLanes(F32x16 a) {
  if constexpr (kDistance == 8) return {a.hi, a.lo};
  if constexpr (kDistance == 4) {
    return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
  }
  constexpr int kOrder = kDistance == 2 ? _MM_SHUFFLE(1, 0, 3, 2) : _MM_SHUFFLE(2, 3, 0, 1);
  return {_mm256_permute_ps(a.lo, kOrder), _mm256_permute_ps(a.hi, kOrder)};
}

struct U32x16 {
  __m256i lo, hi;
};
// Eight words of three bytes: twelve bytes to each half, then three of them to each word.
inline __m256i LoadWords3(const uint8_t* p) {
  const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                          4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
  const __m128i* low = reinterpret_cast<const __m128i*>(p);
  const __m128i* high = reinterpret_cast<const __m128i*>(p + 8);  // no byte past the last word
  return _mm256_shuffle_epi8(_mm256_set_m128i(_mm_loadu_si128(high), _mm_loadu_si128(low)), spread);
}
template <int kBytes>
inline U32x16 LoadWords(const uint8_t* p) {
  if constexpr (kBytes == 3) return {LoadWords3(p), LoadWords3(p + 24)};
  const __m256i* half = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
inline U32x16 operator>>(U32x16 a, int n) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
inline U32x16 Magnitude(F32x16 a) {
  return {_mm256_castps_si256(Abs(a).lo), _mm256_castps_si256(Abs(a).hi)};
}
inline U32x16 Max(U32x16 a, U32x16 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
// Eight vectors: each step halves the words that are left of two and puts them into one.
inline __m256 MaxOfEach8(const U32x16* a) {
  __m256 by8[8], by4[4], by2[2];
  const auto max = [](__m256 x, __m256 y) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
  };
  for (int i = 0; i < 8; ++i) by8[i] = _mm256_castsi256_ps(_mm256_max_epi32(a[i].lo, a[i].hi));
  for (int i = 0; i < 4; ++i) {
    by4[i] = max(_mm256_permute2f128_ps(by8[i], by8[i + 4], 0x20),
                 _mm256_permute2f128_ps(by8[i], by8[i + 4], 0x31));
  }
  for (int i = 0; i < 2; ++i) {
    by2[i] = max(_mm256_shuffle_ps(by4[2 * i], by4[2 * i + 1], _MM_SHUFFLE(1, 0, 1, 0)),
                 _mm256_shuffle_ps(by4[2 * i], by4[2 * i + 1], _MM_SHUFFLE(3, 2, 3, 2)));
  }
  return max(_mm256_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(2, 0, 2, 0)),
             _mm256_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(3, 1, 3, 1)));
}
inline F32x16 MaxOfEach(const U32x16 (&a)[kLanes]) { return {MaxOfEach8(a), MaxOfEach8(a + 8)}; }
template <int kBits>
inline __m256 CodeValue(__m256i a) {
  if constexpr (kBits == 3) {  // a table look-up, which reads three bits
    const __m256 table = _mm256_setr_ps(-3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f);
    return _mm256_permutevar8x32_ps(table, a);
  }
  const __m256i code = _mm256_and_si256(a, _mm256_set1_epi32(15));
  return _mm256_add_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(-7.5f));
}
template <int kBits>
inline F32x16 CodeValue(U32x16 a) {
  return {CodeValue<kBits>(a.lo), CodeValue<kBits>(a.hi)};
}

#else  // any x86-64

struct F32x16 {
  float v[kLanes];
};

// f(lane) in every lane.
template <typename F>
inline F32x16 EachLane(F f) {
  F32x16 result;
  for (int l = 0; l < kLanes; ++l) result.v[l] = f(l);
  return result;
}

inline F32x16 Set1(float x) {
  return EachLane([=](int) { return x; });
}
inline F32x16 LoadN(const float* p, int64_t n) {
  F32x16 result = {};
  std::memcpy(result.v, p, static_cast<size_t>(n) * sizeof(float));
  return result;
}
inline F32x16 Load(const float* p) { return LoadN(p, kLanes); }
inline F32x16 LoadBf16N(const void* p, int64_t n) {
  uint16_t bits[kLanes] = {};
  std::memcpy(bits, p, static_cast<size_t>(n) * sizeof(uint16_t));
  uint32_t wide[kLanes];
  for (int l = 0; l < kLanes; ++l) wide[l] = static_cast<uint32_t>(bits[l]) << 16;
  F32x16 result;
  std::memcpy(result.v, wide, sizeof(wide));
  return result;
}
inline F32x16 LoadBf16(const void* p) { return LoadBf16N(p, kLanes); }
inline void StoreN(const F32x16& a, float* p, int64_t n) {
  std::memcpy(p, a.v, static_cast<size_t>(n) * sizeof(float));
}
inline void Store(const F32x16& a, float* p) { StoreN(a, p, kLanes); }
inline void StoreI8(const F32x16& a, int8_t* p) {
  for (int l = 0; l < kLanes; ++l) p[l] = static_cast<int8_t>(a.v[l]);
}

inline F32x16 operator+(const F32x16& a, const F32x16& b) {
  return EachLane([&](int l) { return a.v[l] + b.v[l]; });
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
  return EachLane([&](int l) { return a.v[l] - b.v[l]; });
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
  return EachLane([&](int l) { return a.v[l] * b.v[l]; });
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
  return EachLane([&](int l) { return a.v[l] / b.v[l]; });
}
inline F32x16 Ratio(const F32x16& a, const F32x16& b, const F32x16&) { return a / b; }
inline F32x16 Max(const F32x16& a, const F32x16& b) {
  return EachLane([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; });
}
inline F32x16 Min(const F32x16& a, const F32x16& b) {
  return EachLane([&](int l) { return a.v[l] < b.v[l] ? a.v[l] : b.v[l]; });
}
inline F32x16 Abs(const F32x16& a) {
  return EachLane([&](int l) { return __builtin_fabsf(a.v[l]); });
}
inline F32x16 FirstN(const F32x16& a, int64_t n, const F32x16& b) {
  return EachLane([&](int l) { return l < n ? a.v[l] : b.v[l]; });
}
inline F32x16 IfLess(const F32x16& a, const F32x16& b, const F32x16& yes, const F32x16& no) {
  return EachLane([&](int l) { return a.v[l] < b.v[l] ? yes.v[l] : no.v[l]; });
}
inline F32x16 CeilBf16(const F32x16& a) {
  uint32_t bits[kLanes];
  std::memcpy(bits, a.v, sizeof(bits));
  for (uint32_t& word : bits) word = (word + 0xffff) & 0xffff0000;
  F32x16 result;
  std::memcpy(result.v, bits, sizeof(bits));
  return result;
}
inline F32x16 ShiftExponent(const F32x16& a, const F32x16& b) {
  uint32_t bits[kLanes], shift[kLanes];
  std::memcpy(bits, a.v, sizeof(bits));
  std::memcpy(shift, b.v, sizeof(shift));
  for (int l = 0; l < kLanes; ++l) bits[l] += shift[l] << 23;
  F32x16 result;
  std::memcpy(result.v, bits, sizeof(bits));
  return result;
}

// a's lanes folded in halves: f(lane, lane + 8), then + 4, + 2, + 1.
template <typename F>
inline float Fold(F32x16 a, F f) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) a.v[l] = f(a.v[l], a.v[l + half]);
  }
  return a.v[0];
}
inline float Sum(const F32x16& a) {
  return Fold(a, [](float x, float y) { return x + y; });
}
inline float MaxLane(const F32x16& a) {
  return Fold(a, [](float x, float y) { return x > y ? x : y; });
}

inline F32x16 LoadI8N(const int8_t* p, int64_t n) {
  return EachLane([=](int l) { return l < n ? static_cast<float>(p[l]) : 0.0f; });
}
inline F32x16 LoadI8(const int8_t* p) { return LoadI8N(p, kLanes); }
template <int kDistance>
inline F32x16 SwapLanes(const F32x16& a) {
  return EachLane([&](int l) { return a.v[l ^ kDistance]; });
}

struct U32x16 {
  uint32_t v[kLanes];
};
template <int kBytes>
inline U32x16 LoadWords(const uint8_t* p) {
  U32x16 words = {};
  for (int l = 0; l < kLanes; ++l) std::memcpy(&words.v[l], p + l * kBytes, kBytes);
  return words;
}
inline U32x16 operator>>(const U32x16& a, int n) {
  U32x16 words;
  for (int l = 0; l < kLanes; ++l) words.v[l] = a.v[l] >> n;
  return words;
}
inline U32x16 Magnitude(const F32x16& a) {
  U32x16 words;
  std::memcpy(words.v, a.v, sizeof(words));
  for (uint32_t& word : words.v) word &= 0x7fffffff;
  return words;
}
inline U32x16 Max(const U32x16& a, const U32x16& b) {
  U32x16 words;
  for (int l = 0; l < kLanes; ++l) words.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l];
  return words;
}
inline F32x16 MaxOfEach(const U32x16 (&a)[kLanes]) {
  uint32_t words[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    for (const uint32_t word : a[i].v) words[i] = word > words[i] ? word : words[i];
  }
  F32x16 result;
  std::memcpy(result.v, words, sizeof(words));
  return result;
}
template <int kBits>
inline F32x16 CodeValue(const U32x16& a) {
  constexpr float kLow = 0.5f - (1 << (kBits - 1));
  return EachLane([&](int l) {
    return static_cast<float>(static_cast<int>(a.v[l] & ((1 << kBits) - 1))) + kLow;
  });
}

#endif

#if defined(__AVX2__)

inline float Sum(F32x16 a) {
  const __m256 by8 = _mm256_add_ps(LowHalf(a), HighHalf(a));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}
inline float MaxLane(F32x16 a) {
  const __m256 by8 = _mm256_max_ps(LowHalf(a), HighHalf(a));
  const __m128 by4 = _mm_max_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_max_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_max_ss(by2, _mm_movehdup_ps(by2)));
}

#endif

// The rest is the same text for all of them.

inline F32x16 Zero() { return Set1(0.0f); }

// The square root of one float, correctly rounded (SSE2 is part of x86-64).
inline float Sqrt(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// 1.5 * 2^23: a float near it has no fraction bits, so adding it rounds to an integer, half to
// even.
constexpr float kRoundMagic = 12582912.0f;

// Ratio(a, b, r) rounds to the same integer as a / b does where b is a bf16 of at least
// kLeastRatioDivisor and |a / b| < 2^7, and costs a fifth where there are fused instructions.
// Proof: q = a * r is within 2^-22 of a / b, relatively. b has 8 bits, so that the rest a - q * b
// is exact, and q + rest * r is, before its rounding, within 2^-44. A middle of two integers below
// 2^7 has 8 bits: if a / b is one, it comes out. If not, a is a float other than the middle * b,
// which is also a float: the two are one unit of a's apart, which moves a / b by more than half a
// unit of the middle's (b's 8 bits keep the factor below 2 - 2^-7): it is not rounded there.
constexpr float kLeastRatioDivisor = 0x1p-100f;  // the rest is no denormal

// |a| <= 2^22.
inline F32x16 Round(const F32x16& a) { return (a + Set1(kRoundMagic)) - Set1(kRoundMagic); }

// |a| <= 2^22.
inline F32x16 Floor(const F32x16& a) {
  const F32x16 nearest = Round(a);
  return IfLess(a, nearest, nearest - Set1(1.0f), nearest);
}

// e^x within about 1.5 units in the last place: 2^n times a polynomial of the rest, |rest| <= ln(2)
// / 2. 0 below -87.33, where floats begin to lose bits (so for -inf); 2.4e38 above 88.37; NaN stays
// NaN.
inline F32x16 Exp(const F32x16& x) {
  constexpr float kLowest = -87.33f;
  const F32x16 clamped = Max(Set1(kLowest), Min(Set1(88.37f), x));
  const F32x16 shifted = clamped * Set1(1.44269504f) + Set1(kRoundMagic);  // n in its low bits
  const F32x16 n = shifted - Set1(kRoundMagic);
  // ln(2) in two parts; the first has 9 bits, so that n times it is exact.
  const F32x16 r = (clamped - n * Set1(0.693359375f)) - n * Set1(-2.12194440e-4f);
  F32x16 p = Set1(1.0f / 5040);
  p = p * r + Set1(1.0f / 720);
  p = p * r + Set1(1.0f / 120);
  p = p * r + Set1(1.0f / 24);
  p = p * r + Set1(1.0f / 6);
  p = p * r + Set1(0.5f);
  p = (p * (r * r) + r) + Set1(1.0f);
  return IfLess(x, Set1(kLowest), Zero(), ShiftExponent(p, shifted));
}

}  // namespace
}  // namespace ternion::kernels
