// The operations of simd.h on AVX-512: one register is the vector. Included there alone.
#pragma once

namespace ternion::kernels {
namespace {

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

}  // namespace
}  // namespace ternion::kernels
