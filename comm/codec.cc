#include "comm/codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/checked.h"

namespace ternion::comm {
namespace {

constexpr const char* kNames[] = {"fp32", "bf16", "int8", "int4"};
constexpr int64_t kMaxBlock = 128;
constexpr uint16_t kBf16Nan = 0x7FC0;

float FromBf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// The largest magnitude; NaN when there is a NaN (as bits, NaN is above all others).
float AbsMax(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu);
  }
  return std::bit_cast<float>(largest);
}

// The smallest bf16 not below `x` >= 0: a scale that is rounded down would push codes past their
// range.
uint16_t Bf16RoundedUp(float x) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + 0xFFFFu) >> 16);
}

// Half to even, for |x| < 2^22: the sum has no bits left below the integer.
float RoundHalfEven(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// Codes of one block; returns its scale as bf16. A block that holds NaN or infinity decodes to NaN.
uint16_t QuantizeBlock(const float* x, int64_t count, float max_code, int8_t* codes) {
  const float absmax = AbsMax(x, count);
  if (absmax == 0.0f || !std::isfinite(absmax)) {
    std::memset(codes, 0, count);
    return absmax == 0.0f ? 0 : kBf16Nan;
  }
  const uint16_t scale_bits = Bf16RoundedUp(absmax / max_code);
  const float scale = FromBf16(scale_bits);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(RoundHalfEven(x[i] / scale)));
  }
  return scale_bits;
}

void EncodeBlocks(RowFormat format, const float* x, int64_t dim, uint8_t* out) {
  const kernels::RowBlocks blocks = BlocksOf(format);
  uint8_t* codes_out = out + 2 * base::CeilDiv(dim, blocks.elements);
  int8_t codes[kMaxBlock];
  for (int64_t begin = 0; begin < dim; begin += blocks.elements) {
    const int64_t count = std::min(blocks.elements, dim - begin);
    const uint16_t scale = QuantizeBlock(x + begin, count, blocks.max_code, codes);
    std::memcpy(out, &scale, sizeof(scale));
    out += sizeof(scale);
    if (format == RowFormat::kInt8) {
      std::memcpy(codes_out + begin, codes, count);
    } else {
      PackInt4(codes, count, codes_out + begin / 2);
    }
  }
}

void DecodeBlocks(RowFormat format, const uint8_t* bytes, int64_t dim, float* x) {
  const kernels::RowBlocks blocks = BlocksOf(format);
  const uint8_t* codes_in = bytes + 2 * base::CeilDiv(dim, blocks.elements);
  int8_t codes[kMaxBlock];
  for (int64_t begin = 0; begin < dim; begin += blocks.elements) {
    const int64_t count = std::min(blocks.elements, dim - begin);
    uint16_t scale_bits;
    std::memcpy(&scale_bits, bytes, sizeof(scale_bits));
    bytes += sizeof(scale_bits);
    if (format == RowFormat::kInt8) {
      std::memcpy(codes, codes_in + begin, count);
    } else {
      UnpackInt4(codes_in + begin / 2, count, codes);
    }
    const float scale = FromBf16(scale_bits);
    for (int64_t i = 0; i < count; ++i) x[begin + i] = static_cast<float>(codes[i]) * scale;
  }
}

}  // namespace

absl::string_view RowFormatName(RowFormat format) { return kNames[static_cast<int>(format)]; }

absl::StatusOr<RowFormat> ParseRowFormat(absl::string_view name) {
  for (RowFormat format :
       {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8, RowFormat::kInt4}) {
    if (name == RowFormatName(format)) return format;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown row format '", name, "'; choose fp32, bf16, int8 or int4"));
}

int64_t CombineRowBytes(RowFormat format, int64_t dim) {
  return kernels::EncodedRowBytes(format, dim);
}

void PackInt4(const int8_t* codes, int64_t dim, uint8_t* out) {
  for (int64_t i = 0; i < dim / 2; ++i) {
    const int low = codes[2 * i] & 15;
    const int high = codes[2 * i + 1] & 15;
    out[i] = static_cast<uint8_t>(low | high << 4);
  }
  if (dim % 2 != 0) out[dim / 2] = static_cast<uint8_t>(codes[dim - 1] & 15);
}

void UnpackInt4(const uint8_t* packed, int64_t dim, int8_t* codes) {
  // (nibble ^ 8) - 8 extends the sign of four bits.
  for (int64_t i = 0; i < dim / 2; ++i) {
    codes[2 * i] = static_cast<int8_t>(((packed[i] & 15) ^ 8) - 8);
    codes[2 * i + 1] = static_cast<int8_t>(((packed[i] >> 4) ^ 8) - 8);
  }
  if (dim % 2 != 0) codes[dim - 1] = static_cast<int8_t>(((packed[dim / 2] & 15) ^ 8) - 8);
}

void EncodeBf16(const float* x, int64_t dim, uint8_t* out) {
  for (int64_t i = 0; i < dim; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    // Rounding could carry a NaN into infinity: keep its top bits and make it quiet.
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const uint16_t half = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : rounded);
    std::memcpy(out + 2 * i, &half, sizeof(half));
  }
}

void DecodeBf16(const uint8_t* bytes, int64_t dim, float* x) {
  for (int64_t i = 0; i < dim; ++i) {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, sizeof(half));
    x[i] = FromBf16(half);
  }
}

void EncodeCombineRow(RowFormat format, const float* x, int64_t dim, uint8_t* out) {
  switch (format) {
    case RowFormat::kFp32:
      std::memcpy(out, x, dim * sizeof(float));
      break;
    case RowFormat::kBf16:
      EncodeBf16(x, dim, out);
      break;
    case RowFormat::kInt8:
    case RowFormat::kInt4:
      EncodeBlocks(format, x, dim, out);
      break;
  }
}

void DecodeCombineRow(RowFormat format, const uint8_t* bytes, int64_t dim, float* x) {
  switch (format) {
    case RowFormat::kFp32:
      std::memcpy(x, bytes, dim * sizeof(float));
      break;
    case RowFormat::kBf16:
      DecodeBf16(bytes, dim, x);
      break;
    case RowFormat::kInt8:
    case RowFormat::kInt4:
      DecodeBlocks(format, bytes, dim, x);
      break;
  }
}

}  // namespace ternion::comm
