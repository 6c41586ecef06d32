// Rows as they travel (kernels/row_codec.h): encoding, decoding, and sums of encoded rows.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// Largest magnitude of a warp's values, as bits: their order is that of |x|, with NaN above
// infinity.
__device__ inline uint32_t WarpMaxBits(uint32_t bits) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, bits, distance);
    bits = bits > other ? bits : other;
  }
  return bits;
}

// The scale of a block whose largest magnitude is `largest`: rounded up to bf16, NaN if that is
// not finite.
__device__ inline float BlockScale(uint32_t largest, float max_code) {
  const float exact = __uint_as_float(largest) / max_code;
  const uint32_t bits = __float_as_uint(exact < Infinity() ? exact : QuietNan());
  return __uint_as_float((bits + 0xffff) & 0xffff0000);
}

// Low bits of x / scale rounded; 0 where the scale is 0 or NaN.
__device__ inline uint32_t BlockCode(float x, float scale) {
  return scale > 0 ? __float_as_uint(x / scale + kRoundMagic) : 0;
}

// A warp encodes one block of elements at a time; a block's codes are whole bytes.
template <RowFormat kFormat>
__device__ inline void EncodeBlocks(const float* x, int64_t dim, uint8_t* out) {
  constexpr int64_t kBlock = BlocksOf(kFormat).elements;
  constexpr float kMaxCode = BlocksOf(kFormat).max_code;
  constexpr bool kNibbles = kFormat == RowFormat::kInt4;
  uint8_t* codes = out + ScaleBytes(kFormat, dim);
  const int lane = threadIdx.x % kWarp;
  const int64_t num_blocks = base::CeilDiv(dim, kBlock);
  for (int64_t b = threadIdx.x / kWarp; b < num_blocks; b += blockDim.x / kWarp) {
    const int64_t begin = b * kBlock;
    const int64_t count = dim - begin < kBlock ? dim - begin : kBlock;
    uint32_t largest = 0;
    for (int64_t i = lane; i < count; i += kWarp) {
      const uint32_t bits = __float_as_uint(x[begin + i]) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    const float scale = BlockScale(WarpMaxBits(largest), kMaxCode);
    if (lane == 0) StoreU16(static_cast<uint16_t>(__float_as_uint(scale) >> 16), out + 2 * b);
    if constexpr (kNibbles) {
      for (int64_t i = 2 * lane; i < count; i += 2 * kWarp) {
        const uint32_t low = BlockCode(x[begin + i], scale) & 15;
        const uint32_t high = i + 1 < count ? BlockCode(x[begin + i + 1], scale) & 15 : 0;
        codes[(begin + i) / 2] = static_cast<uint8_t>(low | high << 4);
      }
    } else {
      for (int64_t i = lane; i < count; i += kWarp) {
        codes[begin + i] = static_cast<uint8_t>(BlockCode(x[begin + i], scale));
      }
    }
  }
}

__global__ void EncodeRowsKernel(EncodeRowsArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int64_t source = args.rows == nullptr ? row : args.rows[row];
  const float* x = args.x + source * args.x_stride;
  uint8_t* out = args.out + row * EncodedRowBytes(args.format, args.dim);
  switch (args.format) {
    case RowFormat::kFp32:  // of any alignment
      return ForEach(args.dim, [&](int64_t i) {
        const uint32_t bits = __float_as_uint(x[i]);
        StoreU16(static_cast<uint16_t>(bits), out + 4 * i);
        StoreU16(static_cast<uint16_t>(bits >> 16), out + 4 * i + 2);
      });
    case RowFormat::kBf16:
      return ForEach(args.dim, [&](int64_t i) { StoreU16(ToBf16(x[i]), out + 2 * i); });
    case RowFormat::kInt8:
      return EncodeBlocks<RowFormat::kInt8>(x, args.dim, out);
    case RowFormat::kInt4:
      return EncodeBlocks<RowFormat::kInt4>(x, args.dim, out);
  }
}

__device__ inline int SignedNibble(const uint8_t* packed, int64_t i) {
  const uint32_t nibble = packed[i / 2] >> (i % 2 * 4) & 15;
  return static_cast<int>(nibble ^ 8) - 8;
}

// Element i of an encoded row.
__device__ inline float Decode(RowFormat format, const uint8_t* row, int64_t dim, int64_t i) {
  const RowBlocks blocks = BlocksOf(format);
  if (blocks.elements > 0) {
    const float scale = FromBf16(LoadU16(row + i / blocks.elements * 2));
    const uint8_t* codes = row + ScaleBytes(format, dim);
    const int code =
        format == RowFormat::kInt8 ? static_cast<int8_t>(codes[i]) : SignedNibble(codes, i);
    return static_cast<float>(code) * scale;
  }
  if (format == RowFormat::kBf16) return FromBf16(LoadU16(row + 2 * i));
  return __uint_as_float(LoadU16(row + 4 * i) | uint32_t{LoadU16(row + 4 * i + 2)} << 16);
}

__global__ void DecodeRowsKernel(DecodeRowsArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const uint8_t* in = args.rows + row * EncodedRowBytes(args.format, args.dim);
  float* out = args.out + row * args.dim;
  ForEach(args.dim, [&](int64_t i) { out[i] = Decode(args.format, in, args.dim, i); });
}

__global__ void AddRowsKernel(AddRowsArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (i >= args.dim) return;
  float* out = args.out + row * args.dim + i;
  float sum = *out;
  for (int32_t j = args.begin[row]; j < args.begin[row + 1]; ++j) {
    const RowTerm term = args.terms[j];
    const float value =
        term.format == RowFormat::kFp32
            ? static_cast<const float*>(term.row)[i]
            : Decode(term.format, static_cast<const uint8_t*>(term.row), args.dim, i);
    sum = sum + term.weight * value;
  }
  *out = sum;
}

__global__ void PackCodesKernel(PackCodesArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int64_t source = args.rows == nullptr ? row : args.rows[row];
  const int8_t* codes = args.codes + source * args.codes_stride;
  const int64_t row_bytes = CodeBytes(args.format, args.dim);
  uint8_t* out = args.out + row * row_bytes;
  const bool nibbles = args.format == RowFormat::kInt4;
  ForEach(row_bytes, [&](int64_t i) {
    if (!nibbles) {
      out[i] = static_cast<uint8_t>(codes[i]);
      return;
    }
    const int low = codes[2 * i] & 15;
    const int high = 2 * i + 1 < args.dim ? codes[2 * i + 1] & 15 : 0;
    out[i] = static_cast<uint8_t>(low | high << 4);
  });
}

__global__ void UnpackInt4Kernel(UnpackInt4Args args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const uint8_t* packed = args.packed + row * CodeBytes(RowFormat::kInt4, args.dim);
  int8_t* codes = args.codes + row * args.codes_stride;
  ForEach(args.dim, [&](int64_t i) { codes[i] = static_cast<int8_t>(SignedNibble(packed, i)); });
}

}  // namespace

// ---- Launchers

namespace cuda {

void EncodeRows(const EncodeRowsArgs& args, Executor& executor) {
  Launch(EncodeRowsKernel, Blocks(args.num_rows), ThreadsFor(args.dim), executor, args);
}

void DecodeRows(const DecodeRowsArgs& args, Executor& executor) {
  Launch(DecodeRowsKernel, Blocks(args.num_rows), ThreadsFor(args.dim), executor, args);
}

void AddRows(const AddRowsArgs& args, Executor& executor) {
  const int threads = ThreadsFor(args.dim);
  const dim3 grid(Blocks(args.num_rows), Blocks(base::CeilDiv(args.dim, threads)));
  Launch(AddRowsKernel, grid, threads, executor, args);
}

void PackCodes(const PackCodesArgs& args, Executor& executor) {
  Launch(PackCodesKernel, Blocks(args.num_rows), ThreadsFor(args.dim / 2), executor, args);
}

void UnpackInt4(const UnpackInt4Args& args, Executor& executor) {
  Launch(UnpackInt4Kernel, Blocks(args.num_rows), ThreadsFor(args.dim), executor, args);
}

}  // namespace cuda
}  // namespace ternion::kernels
