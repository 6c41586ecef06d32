// Rows as they travel between ranks: precisions, and how one row lies in memory.
#pragma once

#include <cstdint>

#include "base/checked.h"

namespace ternion::kernels {

// Precision of a row's elements.
enum class RowFormat : uint8_t { kFp32, kBf16, kInt8, kInt4 };

// An encoded row, [dim] floats at a format. There is no padding: a row may start at any byte.
//
//   fp32  dim floats
//   bf16  dim bf16, rounded to nearest even; NaN stays NaN
//   int8  bf16 scales[ceil(dim / 128)] | int8 codes[dim]
//   int4  bf16 scales[ceil(dim / 32)]  | nibbles codes[ceil(dim / 2)]
//
// Element i of block i / 128 (or / 32) is code * scale. The scale is the block's absmax / 127 (or /
// 7) rounded up to bf16, so that no code leaves its range; code = round half to even of x / scale.
// A block whose absmax / 127 is 0 has scale and codes 0. A block with NaN or infinity has scale NaN
// and codes 0: a broken value must not turn into a number.
//
// Nibbles are two's complement, -8 .. 7 (-7 .. 7 in encoded rows), two a byte, the first in the low
// half. An odd row leaves the last high half 0.
struct RowBlocks {
  int64_t elements = 0;  // that share a scale; 0: there are no scales
  float max_code = 0;
};
constexpr RowBlocks BlocksOf(RowFormat format) {
  if (format == RowFormat::kInt8) return {128, 127.0f};
  if (format == RowFormat::kInt4) return {32, 7.0f};
  return {};
}

// Bytes of `dim` codes, without scales.
constexpr int64_t CodeBytes(RowFormat format, int64_t dim) {
  constexpr int kBits[] = {32, 16, 8, 4};
  return base::CeilDiv(dim * kBits[static_cast<int>(format)], 8);
}

// Bytes of the scales that stand before the codes.
constexpr int64_t ScaleBytes(RowFormat format, int64_t dim) {
  const int64_t elements = BlocksOf(format).elements;
  return elements == 0 ? 0 : base::CeilDiv(dim, elements) * 2;
}

constexpr int64_t EncodedRowBytes(RowFormat format, int64_t dim) {
  return ScaleBytes(format, dim) + CodeBytes(format, dim);
}

}  // namespace ternion::kernels
