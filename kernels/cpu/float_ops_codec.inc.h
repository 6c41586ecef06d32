// Rows as they travel (kernels/row_codec.h): encoding, decoding, and sums of encoded rows.
#pragma once

#include "kernels/cpu/float_ops_rows.inc.h"
#include "kernels/cpu/simd_narrow.h"
#include "kernels/row_codec.h"

namespace ternion::kernels {
namespace {

// f(block, begin, count) for each block of a row.
template <int64_t kBlock, typename F>
TERNION_INLINE void ForEachBlock(int64_t dim, F f) {
  int64_t block = 0, begin = 0;
  for (; begin + kBlock <= dim; begin += kBlock) f(block++, begin, kBlock);
  if (begin < dim) f(block, begin, dim - begin);
}

template <RowFormat kFormat>
inline void StoreCodesN(const I8x16& a, uint8_t* p, int64_t n) {
  kFormat == RowFormat::kInt8 ? StoreBytesN(a, p, n) : StoreNibblesN(a, p, n);
}
template <RowFormat kFormat>
inline F32x16 LoadCodesN(const uint8_t* p, int64_t n) {
  return Widen(kFormat == RowFormat::kInt8 ? LoadBytesN(p, n) : LoadNibblesN(p, n));
}

// The smallest bf16 not below x >= 0: a scale that is rounded down would push codes past their
// range. NaN for infinity.
inline uint16_t ScaleBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits < 0x7f800000 ? static_cast<uint16_t>((bits + 0xffff) >> 16) : uint16_t{0x7fc0};
}
inline float ScaleOf(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float scale;
  std::memcpy(&scale, &wide, sizeof(scale));
  return scale;
}

// The largest magnitude. Min turns a NaN into infinity, since Max would lose it.
inline float AbsMax(const float* x, int64_t count) {
  F32x16 largest = Zero();
  ForEachVector(count, [&](int64_t i, int64_t n) {
    largest = Max(Min(Abs(LoadN(x + i, n)), Set1(__builtin_inff())), largest);
  });
  return MaxLane(largest);
}

template <RowFormat kFormat, typename F>
TERNION_INLINE void StoreRounded(const float* x, int64_t count, uint8_t* codes, F quotient) {
  ForEachVector(count, [&](int64_t i, int64_t n) {
    // The sum's low bits are those of the quotient, rounded.
    const I8x16 code = LowBytes(quotient(LoadN(x + i, n)) + Set1(kRoundMagic));
    StoreCodesN<kFormat>(code, codes + CodeBytes(kFormat, i), n);
  });
}

// Codes of one block.
template <RowFormat kFormat>
TERNION_INLINE void EncodeBlock(const float* x, int64_t count, float scale, uint8_t* codes) {
  if (scale >= kLeastRatioDivisor) [[likely]] {
    const F32x16 inverse = Set1(1.0f / scale);
    StoreRounded<kFormat>(x, count, codes,
                          [&](const F32x16& v) { return Ratio(v, Set1(scale), inverse); });
  } else if (scale > 0) {
    StoreRounded<kFormat>(x, count, codes, [&](const F32x16& v) { return v / Set1(scale); });
  } else {  // 0 or NaN
    std::memset(codes, 0, static_cast<size_t>(CodeBytes(kFormat, count)));
  }
}

template <RowFormat kFormat>
inline void EncodeBlocks(const float* x, int64_t dim, uint8_t* out) {
  constexpr int64_t kBlock = BlocksOf(kFormat).elements;
  constexpr int64_t kStep = kLanes * kBlock;
  uint8_t* codes = out + ScaleBytes(kFormat, dim);
  for (int64_t i = 0; i < dim; i += kStep) {
    const int64_t count = dim - i < kStep ? dim - i : kStep;
    float scales[kLanes] = {};
    uint16_t bits[kLanes];
    ForEachBlock<kBlock>(
        count, [&](int64_t b, int64_t j, int64_t n) { scales[b] = AbsMax(x + i + j, n); });
    for (int l = 0; l < kLanes; ++l) {
      bits[l] = ScaleBits(scales[l] / BlocksOf(kFormat).max_code);
      scales[l] = ScaleOf(bits[l]);
    }
    std::memcpy(out + ScaleBytes(kFormat, i), bits,
                static_cast<size_t>(ScaleBytes(kFormat, count)));
    ForEachBlock<kBlock>(count, [&](int64_t b, int64_t j, int64_t n) {
      EncodeBlock<kFormat>(x + i + j, n, scales[b], codes + CodeBytes(kFormat, i + j));
    });
  }
}

inline void EncodeRow(RowFormat format, const float* x, int64_t dim, uint8_t* out) {
  switch (format) {
    case RowFormat::kFp32:
      std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
      return;
    case RowFormat::kBf16:
      return ForEachVector(
          dim, [&](int64_t i, int64_t n) { StoreBf16N(LoadN(x + i, n), out + 2 * i, n); });
    case RowFormat::kInt8:
      return EncodeBlocks<RowFormat::kInt8>(x, dim, out);
    case RowFormat::kInt4:
      return EncodeBlocks<RowFormat::kInt4>(x, dim, out);
  }
}

void EncodeRows(const EncodeRowsArgs& args, Executor& executor) {
  const int64_t row_bytes = EncodedRowBytes(args.format, args.dim);
  ForEachRow(args.num_rows, args.dim, executor, [&](int64_t row) {
    const int64_t source = args.rows == nullptr ? row : args.rows[row];
    EncodeRow(args.format, args.x + source * args.x_stride, args.dim, args.out + row * row_bytes);
  });
}

// f(begin, count, values) as ForEachVector over the decoded row.
template <RowFormat kFormat, typename F>
TERNION_INLINE void ForEachDecodedInBlocks(const uint8_t* row, int64_t dim, F f) {
  const uint8_t* codes = row + ScaleBytes(kFormat, dim);
  ForEachBlock<BlocksOf(kFormat).elements>(dim, [&](int64_t b, int64_t begin, int64_t count) {
    uint16_t bits;
    std::memcpy(&bits, row + b * sizeof(bits), sizeof(bits));
    const F32x16 scale = Set1(ScaleOf(bits));
    ForEachVector(count, [&](int64_t i, int64_t n) {
      f(begin + i, n, LoadCodesN<kFormat>(codes + CodeBytes(kFormat, begin + i), n) * scale);
    });
  });
}

// The same for any format; at fp32 the row starts at a float's alignment.
template <typename F>
inline void ForEachDecoded(RowFormat format, const void* row, int64_t dim, F f) {
  const uint8_t* bytes = static_cast<const uint8_t*>(row);
  const float* floats = static_cast<const float*>(row);
  switch (format) {
    case RowFormat::kFp32:
      return ForEachVector(dim, [&](int64_t i, int64_t n) { f(i, n, LoadN(floats + i, n)); });
    case RowFormat::kBf16:
      return ForEachVector(dim,
                           [&](int64_t i, int64_t n) { f(i, n, LoadBf16N(bytes + 2 * i, n)); });
    case RowFormat::kInt8:
      return ForEachDecodedInBlocks<RowFormat::kInt8>(bytes, dim, f);
    case RowFormat::kInt4:
      return ForEachDecodedInBlocks<RowFormat::kInt4>(bytes, dim, f);
  }
}

void DecodeRows(const DecodeRowsArgs& args, Executor& executor) {
  const int64_t row_bytes = EncodedRowBytes(args.format, args.dim);
  ForEachRow(args.num_rows, args.dim, executor, [&](int64_t row) {
    const uint8_t* in = args.rows + row * row_bytes;
    float* out = args.out + row * args.dim;
    if (args.format == RowFormat::kFp32) {  // of any alignment
      std::memcpy(out, in, static_cast<size_t>(row_bytes));
      return;
    }
    ForEachDecoded(args.format, in, args.dim,
                   [&](int64_t i, int64_t n, const F32x16& v) { StoreN(v, out + i, n); });
  });
}

inline void PackRow4(const int8_t* codes, int64_t dim, uint8_t* out) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) PackNibbles(codes + i, out + i / 2);
  ForEachVector(dim - i, [&](int64_t j, int64_t n) {
    StoreNibblesN(LoadBytesN(codes + i + j, n), out + (i + j) / 2, n);
  });
}

void PackCodes(const PackCodesArgs& args, Executor& executor) {
  const int64_t row_bytes = CodeBytes(args.format, args.dim);
  ForEachRow(args.num_rows, args.dim / 4, executor, [&](int64_t row) {
    const int64_t source = args.rows == nullptr ? row : args.rows[row];
    const int8_t* codes = args.codes + source * args.codes_stride;
    uint8_t* out = args.out + row * row_bytes;
    if (args.format == RowFormat::kInt4) return PackRow4(codes, args.dim, out);
    std::memcpy(out, codes, static_cast<size_t>(args.dim));
  });
}

inline void UnpackRow4(const uint8_t* packed, int64_t dim, int8_t* codes) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) UnpackNibbles(packed + i / 2, codes + i);
  ForEachVector(dim - i, [&](int64_t j, int64_t n) {
    StoreBytesN(LoadNibblesN(packed + (i + j) / 2, n), codes + i + j, n);
  });
}

void UnpackInt4(const UnpackInt4Args& args, Executor& executor) {
  const int64_t row_bytes = CodeBytes(RowFormat::kInt4, args.dim);
  ForEachRow(args.num_rows, args.dim / 4, executor, [&](int64_t row) {
    UnpackRow4(args.packed + row * row_bytes, args.dim, args.codes + row * args.codes_stride);
  });
}

void AddRows(const AddRowsArgs& args, Executor& executor) {
  const int64_t terms = args.num_rows == 0 ? 0 : args.begin[args.num_rows] / args.num_rows;
  ForEachRow(args.num_rows, args.dim * (terms + 1), executor, [&](int64_t row) {
    float* out = args.out + row * args.dim;
    for (int32_t j = args.begin[row]; j < args.begin[row + 1]; ++j) {
      const RowTerm& term = args.terms[j];
      const F32x16 weight = Set1(term.weight);
      ForEachDecoded(term.format, term.row, args.dim, [&](int64_t i, int64_t n, const F32x16& v) {
        StoreN(LoadN(out + i, n) + weight * v, out + i, n);
      });
    }
  });
}

}  // namespace
}  // namespace ternion::kernels
