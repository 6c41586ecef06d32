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
inline F32x16 LoadCodesN(const uint8_t* p, int64_t n) {
  return Widen(kFormat == RowFormat::kInt8 ? LoadBytesN(p, n) : LoadNibblesN(p, n));
}

inline float ScaleOf(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float scale;
  std::memcpy(&scale, &wide, sizeof(scale));
  return scale;
}

// What rounds to a whole number is stored with its lowest 8 or 4 bits.
template <RowFormat kFormat>
TERNION_INLINE void StoreRounded(const F32x16& x, uint8_t* codes, int64_t n) {
  // The sum's low bits are those of the rounded number.
  const F32x16 rounded = x + Set1(kRoundMagic);
  if constexpr (kFormat == RowFormat::kInt8) return StoreBytesN(LowBytes(rounded), codes, n);
  if (n == kLanes) return StoreLowNibbles(rounded, codes);
  StoreNibblesN(LowBytes(rounded), codes, n);
}

// Codes of one block; inverse is 1 / scale.
template <RowFormat kFormat>
TERNION_INLINE void EncodeBlock(const float* x, int64_t count, float scale, float inverse,
                                uint8_t* codes) {
  if (scale >= kLeastRatioDivisor) [[likely]] {
    ForEachVector(count, [&](int64_t i, int64_t n) {
      StoreRounded<kFormat>(Ratio(LoadN(x + i, n), Set1(scale), Set1(inverse)),
                            codes + CodeBytes(kFormat, i), n);
    });
  } else if (scale > 0) {
    ForEachVector(count, [&](int64_t i, int64_t n) {
      StoreRounded<kFormat>(LoadN(x + i, n) / Set1(scale), codes + CodeBytes(kFormat, i), n);
    });
  } else {  // 0 or NaN
    std::memset(codes, 0, static_cast<size_t>(CodeBytes(kFormat, count)));
  }
}

// Up to sixteen blocks, whose scales are worked out side by side.
template <RowFormat kFormat>
TERNION_INLINE void EncodeGroup(const float* x, int64_t count, uint8_t* scales, uint8_t* codes) {
  constexpr int64_t kBlock = BlocksOf(kFormat).elements;
  U32x16 magnitudes[kLanes] = {};
  ForEachBlock<kBlock>(count, [&](int64_t b, int64_t begin, int64_t size) {
    ForEachVector(size, [&](int64_t i, int64_t n) {
      magnitudes[b] = Max(magnitudes[b], Magnitude(LoadN(x + begin + i, n)));
    });
  });
  // Rounded up: a scale that is rounded down would push codes past their range.
  const F32x16 exact = MaxOfEach(magnitudes) / Set1(BlocksOf(kFormat).max_code);
  const F32x16 finite = IfLess(exact, Set1(__builtin_inff()), exact, Set1(__builtin_nanf("")));
  const F32x16 rounded = CeilBf16(finite);
  uint16_t bits[kLanes];
  StoreBf16(rounded, bits);
  std::memcpy(scales, bits, static_cast<size_t>(ScaleBytes(kFormat, count)));
  float scale[kLanes], inverse[kLanes];
  Store(rounded, scale);
  Store(Set1(1.0f) / rounded, inverse);
  ForEachBlock<kBlock>(count, [&](int64_t b, int64_t begin, int64_t size) {
    EncodeBlock<kFormat>(x + begin, size, scale[b], inverse[b], codes + CodeBytes(kFormat, begin));
  });
}

template <RowFormat kFormat>
inline void EncodeBlocks(const float* x, int64_t dim, uint8_t* out) {
  constexpr int64_t kGroup = kLanes * BlocksOf(kFormat).elements;
  uint8_t* codes = out + ScaleBytes(kFormat, dim);
  int64_t i = 0;
  for (; i + kGroup <= dim; i += kGroup) {
    EncodeGroup<kFormat>(x + i, kGroup, out + ScaleBytes(kFormat, i),
                         codes + CodeBytes(kFormat, i));
  }
  if (i == dim) return;
  EncodeGroup<kFormat>(x + i, dim - i, out + ScaleBytes(kFormat, i), codes + CodeBytes(kFormat, i));
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
