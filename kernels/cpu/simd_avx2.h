// The operations of simd.h on AVX2 and FMA: two registers are the vector. Included there alone.
#pragma once

namespace ternion::kernels {
namespace {

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

}  // namespace
}  // namespace ternion::kernels
