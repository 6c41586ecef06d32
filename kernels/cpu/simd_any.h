// The operations of simd.h on any x86-64, lane by lane. Included there alone.
#pragma once

namespace ternion::kernels {
namespace {

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

}  // namespace
}  // namespace ternion::kernels
