// Where the codes of a page of the KV cache lie (kernels/kv_page.h).
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/kv_page.h"

namespace ternion::kernels {
namespace {

constexpr int kWordCodes = 8;   // codes of a word, below 8 bits
constexpr int kWordLanes = 16;  // words side by side

// Of one KV head's keys or values in a page.
template <KvFormat kFormat>
struct PageLayout {
  static constexpr int kBits = KvBits(kFormat);
  static constexpr bool kPacked = kBits < 8;
  static constexpr int64_t kWordsBytes = int64_t{kWordLanes} * kBits;
  static constexpr int64_t kValueBlockBytes = kPageTokens / kWordCodes * kWordsBytes;

  static __device__ int64_t KeysBytes(int head_dim) {
    return int64_t{kBits} * head_dim * kPageTokens / 8;
  }
  static __device__ int64_t ValuesBytes(int head_dim) {
    return kPacked ? base::CeilDiv(head_dim, kWordLanes) * kValueBlockBytes : KeysBytes(head_dim);
  }
  // First byte of the word that holds a code, which is its `KeyField`-th or `ValueField`-th.
  static __device__ int64_t KeyWord(int d, int token) {
    return d * kWordsBytes + token % kWordLanes * kBits;
  }
  static __device__ int KeyField(int token) { return token / kWordLanes; }
  static __device__ int64_t ValueWord(int d, int token) {
    return d / kWordLanes * kValueBlockBytes + token / kWordCodes * kWordsBytes +
           d % kWordLanes * kBits;
  }
  static __device__ int ValueField(int token) { return token % kWordCodes; }
};

// A code of kBits as code - 2^(kBits - 1) + 0.5.
template <int kBits>
__device__ inline float CodeAt(const uint8_t* word, int field) {
  const int bit = field * kBits;
  uint32_t bits = word[bit / 8];
  if (bit % 8 + kBits > 8) bits |= uint32_t{word[bit / 8 + 1]} << 8;
  const int code = static_cast<int>(bits >> bit % 8 & ((1 << kBits) - 1));
  return static_cast<float>(code) + (0.5f - (1 << (kBits - 1)));
}

template <int kBits>
__device__ inline void SetCode(uint8_t* word, int field, int code) {
  const int bit = field * kBits;
  uint8_t* byte = word + bit / 8;
  const int mask = ((1 << kBits) - 1) << bit % 8;
  const int bits = code << bit % 8;
  byte[0] = static_cast<uint8_t>((byte[0] & ~mask) | bits);
  if (mask > 255) byte[1] = static_cast<uint8_t>((byte[1] & ~(mask >> 8)) | bits >> 8);
}

// One KV head's share of a page.
struct HeadPage {
  uint8_t* keys;
  uint8_t* values;
  float* key_scales;    // [kPageTokens], null at bf16
  float* value_scales;  // [kPageTokens], null at bf16
};
template <KvFormat kFormat>
__device__ inline HeadPage ShareOf(const KvPage& page, int kv_head, int head_dim) {
  using Layout = PageLayout<kFormat>;
  const int64_t scales = int64_t{kv_head} * kPageTokens;
  const bool scaled = kFormat != KvFormat::kBf16;
  return {static_cast<uint8_t*>(page.keys) + kv_head * Layout::KeysBytes(head_dim),
          static_cast<uint8_t*>(page.values) + kv_head * Layout::ValuesBytes(head_dim),
          scaled ? page.key_scales + scales : nullptr,
          scaled ? page.value_scales + scales : nullptr};
}

// Of the keys (values) of a head's share of a page, or of a part of them that begins with element
// (token, or with packed values element) 0.
template <KvFormat kFormat>
__device__ inline float KeyAt(const uint8_t* keys, int d, int token) {
  using Layout = PageLayout<kFormat>;
  const int64_t index = int64_t{d} * kPageTokens + token;
  if constexpr (kFormat == KvFormat::kBf16) {
    return FromBf16(reinterpret_cast<const uint16_t*>(keys)[index]);
  } else if constexpr (kFormat == KvFormat::kInt8) {
    return static_cast<float>(reinterpret_cast<const int8_t*>(keys)[index]);
  } else {
    return CodeAt<Layout::kBits>(keys + Layout::KeyWord(d, token), Layout::KeyField(token));
  }
}
template <KvFormat kFormat>
__device__ inline float ValueAt(const uint8_t* values, int d, int token, int head_dim) {
  using Layout = PageLayout<kFormat>;
  const int64_t index = int64_t{token} * head_dim + d;
  if constexpr (kFormat == KvFormat::kBf16) {
    return FromBf16(reinterpret_cast<const uint16_t*>(values)[index]);
  } else if constexpr (kFormat == KvFormat::kInt8) {
    return static_cast<float>(reinterpret_cast<const int8_t*>(values)[index]);
  } else {
    return CodeAt<Layout::kBits>(values + Layout::ValueWord(d, token), Layout::ValueField(token));
  }
}

}  // namespace
}  // namespace ternion::kernels
