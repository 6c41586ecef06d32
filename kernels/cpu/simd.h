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

}  // namespace
}  // namespace ternion::kernels

#if defined(__AVX512F__)
#include "kernels/cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "kernels/cpu/simd_avx2.h"
#else
#include "kernels/cpu/simd_any.h"
#endif

namespace ternion::kernels {
namespace {

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
