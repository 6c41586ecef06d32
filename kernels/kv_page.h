// Pages of the KV cache: their precisions and how they lie in memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace ternion::kernels {

// Precision of keys and values (NUMERICS.md, KV cache).
enum class KvFormat : uint8_t { kBf16, kInt8, kInt4, kInt3 };

const char* KvFormatName(KvFormat format);  // "bf16", "int8", "int4", "int3"
std::optional<KvFormat> ParseKvFormat(const std::string& name);
constexpr int KvBits(KvFormat format) {
  constexpr int kBits[] = {16, 8, 4, 3};
  return kBits[static_cast<int>(format)];
}
std::optional<KvFormat> KvFormatOfBits(int bits);

// One page holds kPageTokens tokens of one layer, after RoPE.
//
// bf16 (round to nearest even) and int8: one element after the other.
//   keys   [kv_heads][head_dim][kPageTokens]   (one load gives 16 tokens' same element)
//   values [kv_heads][kPageTokens][head_dim]
//
// int4 and int3 (b bits): words of b bytes hold eight codes, the first in the lowest bits, lowest
// byte first. Sixteen words are eight vectors of 16 lanes: code i of word l is lane l of vector i.
//   keys   [kv_heads][head_dim][16 words]
//          vector i: tokens 16i .. 16i + 15
//   values [kv_heads][ceil(head_dim / 16)][kPageTokens / 8][16 words]
//          vector i of block j, group g: elements 16j .. 16j + 15 of token 8g + i
//
// One fp32 scale per token and KV head, for K and for V; with m = max(absmax, 1e-5) of the head:
//   int8: code = clamp(round(x * (127 / m)), -127, 127), worth code * (m / 127)
//   b bits, L = 2^(b-1): code = clamp(floor(x * (L / m)), -L, L - 1) + L, worth
//   (code - L + 0.5) * (m / L): there is no zero
// Position 0 of a sequence (the BOS, which every token looks at) stays bf16 in `first`; its slot in
// page 0 has the scales 0 and unspecified codes. Every other token is rounded as it is written: a
// page that stayed bf16 until it is full would make the tokens of a prompt depend on how it was
// cut.
inline constexpr int kPageTokens = 128;
struct KvPage {
  void* keys = nullptr;
  void* values = nullptr;
  float* key_scales = nullptr;    // [kv_heads][kPageTokens], null at bf16
  float* value_scales = nullptr;  // [kv_heads][kPageTokens], null at bf16
  uint16_t* first = nullptr;      // [{K, V}][kv_heads][head_dim]; page 0's, else null; null at bf16
};

// Bytes of each part of one page of one layer.
struct KvPageSize {
  int64_t key_bytes = 0;
  int64_t value_bytes = 0;
  int64_t scale_bytes = 0;  // of key_scales, and of value_scales
  int64_t bytes() const { return key_bytes + value_bytes + 2 * scale_bytes; }
};
KvPageSize SizeOfKvPage(KvFormat format, int kv_heads, int head_dim);

}  // namespace ternion::kernels
