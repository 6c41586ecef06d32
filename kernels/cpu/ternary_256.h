// Ternary product with 256-bit vectors, shared by the AVX2 and AVX-VNNI variants. A block of codes
// is two halves of 8 output rows x 4 columns per 2-bit field. Instr is how the variant multiplies:
//
//   kMaxColumnRows        see ternary_lines.h
//   kRows                 rows in a register tile (each takes two accumulators)
//   kMaxSums              dot products that a Partial can take before it must be widened
//   Add(Partial, codes, activations), Widen(Partial) -> int32 lanes
//
// Included by files compiled for one instruction set (see variants.h).
#pragma once

#include <immintrin.h>

#include "kernels/cpu/ternary_blocking.h"
#include "kernels/cpu/ternary_columns.h"
#include "kernels/cpu/ternary_rows.h"

namespace ternion::kernels {

template <typename Instr>
struct Micro256 {
  static constexpr int kHalves = 2;
  static constexpr int kMaxStreamedRows = 2 * Instr::kRows;
  static constexpr int kStreamRows = Instr::kRows;
  static constexpr int kTileRows = Instr::kRows;
  static constexpr int64_t kMaxBlocks = Instr::kMaxSums / kNumFields;  // between two widenings

  static __m256i Load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256i Broadcast(const int8_t* x) {
    int32_t dword;
    __builtin_memcpy(&dword, x, sizeof(dword));
    return _mm256_set1_epi32(dword);
  }
  static __m256i Field(__m256i half, int f) {
    return _mm256_and_si256(_mm256_srli_epi32(half, 2 * f), _mm256_set1_epi8(3));
  }

  // All ones in the lanes of half h that hold outputs.
  static __m256i Mask(int num_outputs, int h) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(num_outputs - 8 * h), lane);
  }

  static float* Y(const OutputTile& out, int row, int half) {
    return out.y + row * out.y_stride + 8 * half;
  }

  static __m256i LoadSums(const OutputTile& out, int row, int half) {
    const int* y = reinterpret_cast<const int*>(Y(out, row, half));
    return _mm256_maskload_epi32(y, Mask(out.num_outputs, half));
  }

  static void StoreSums(const OutputTile& out, int row, int half, __m256i sums) {
    int* y = reinterpret_cast<int*>(Y(out, row, half));
    _mm256_maskstore_epi32(y, Mask(out.num_outputs, half), sums);
  }

  static void StoreOutputs(const OutputTile& out, int row, int half, __m256i dot) {
    const __m256i sum = _mm256_set1_epi32(out.x_sums[row]);
    const __m256 scale = _mm256_set1_ps(out.weight_scale * out.x_scales[row]);
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(dot, sum)), scale);
    _mm256_maskstore_ps(Y(out, row, half), Mask(out.num_outputs, half), value);
  }

  // sums += codes of `num_blocks` <= kMaxBlocks blocks times kRows rows. Codes are as in memory
  // (kPacked) or as Unpack leaves them.
  template <int kRows, bool kPacked>
  static void AddBlocks(const uint8_t* codes, const int8_t* x, int64_t num_blocks, Ahead* next,
                        __m256i sums[kRows][kHalves]) {
    // Few rows have few chains of additions: more accumulators per row keep the multipliers busy.
    constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
    __m256i partial[kChains][kRows][kHalves];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) partial[c][r][0] = partial[c][r][1] = _mm256_setzero_si256();
    }

    Ahead ahead;
    if constexpr (kPacked) ahead = *next;
    for (int64_t b = 0; b < num_blocks; ++b) {
      if constexpr (kPacked) ahead.Fetch();
      const __m256i low = Load(codes), high = Load(codes + 32);
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        const uint8_t* field = codes + kBlockSize * f;
        const __m256i half0 = kPacked ? Field(low, f) : Load(field);
        const __m256i half1 = kPacked ? Field(high, f) : Load(field + 32);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m256i four = Broadcast(x + kBlockInputs * r + 4 * f);
          __m256i(&sum)[kHalves] = partial[f % kChains][r];
          sum[0] = Instr::Add(sum[0], half0, four);
          sum[1] = Instr::Add(sum[1], half1, four);
        }
      }
      codes += kPacked ? kBlockSize : kUnpackedBlockSize;
      x += kBlockInputs * kRows;
    }
    if constexpr (kPacked) *next = ahead;
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] = _mm256_add_epi32(sums[r][0], Instr::Widen(partial[c][r][0]));
        sums[r][1] = _mm256_add_epi32(sums[r][1], Instr::Widen(partial[c][r][1]));
      }
    }
  }

  template <int kRows, bool kPacked>
  static void AddAllBlocks(const uint8_t* codes, const int8_t* x, int64_t num_blocks, Ahead* next,
                           __m256i sums[kRows][kHalves]) {
    for (int64_t b = 0; b < num_blocks; b += kMaxBlocks) {
      AddBlocks<kRows, kPacked>(codes, x, Min(kMaxBlocks, num_blocks - b), next, sums);
      codes += kMaxBlocks * (kPacked ? kBlockSize : kUnpackedBlockSize);
      x += kMaxBlocks * kBlockInputs * kRows;
    }
  }

  template <int kRows>
  __attribute__((noinline)) static void StreamRows(const StreamArgs& a) {
    __m256i sums[kRows][kHalves] = {};
    AddAllBlocks<kRows, true>(a.codes, a.x, a.num_blocks, a.ahead, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < kHalves; ++h) StoreOutputs(a.out, r, h, sums[r][h]);
    }
  }

  template <int kRows>
  __attribute__((noinline)) static void TileRows(const TileArgs& a) {
    __m256i sums[kRows][kHalves] = {};
    for (int r = 0; r < kRows && !a.first; ++r) {
      for (int h = 0; h < kHalves; ++h) sums[r][h] = LoadSums(a.out, r, h);
    }
    AddAllBlocks<kRows, false>(a.unpacked, a.x, a.num_blocks, nullptr, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < kHalves; ++h) {
        a.last ? StoreOutputs(a.out, r, h, sums[r][h]) : StoreSums(a.out, r, h, sums[r][h]);
      }
    }
  }

  template <int kRows = kStreamRows>
  static void Stream(const StreamArgs& a) {
    if (a.out.num_rows == kRows) {
      StreamRows<kRows>(a);
    } else if constexpr (kRows > 1) {
      Stream<kRows - 1>(a);
    }
  }

  template <int kRows = kTileRows>
  static void Tile(const TileArgs& a) {
    if (a.out.num_rows == kRows) {
      TileRows<kRows>(a);
    } else if constexpr (kRows > 1) {
      Tile<kRows - 1>(a);
    }
  }

  static void Unpack(const uint8_t* codes, int64_t num_blocks, uint8_t* out) {
    for (int64_t half = 0; half < kHalves * num_blocks; ++half) {
      const __m256i block = Load(codes + 32 * half);
      uint8_t* to = out + half / kHalves * kUnpackedBlockSize + half % kHalves * 32;
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * f), Field(block, f));
      }
    }
  }
};

// See ternary_lines.h.
template <typename Instr>
struct Vec256 {
  using Int = __m256i;
  static constexpr int kBytes = 32;
  static constexpr int64_t kMaxSums = Instr::kMaxSums;
  static constexpr int kRegisterSums = 2 * Instr::kRows;
  static constexpr int kLineRows = Instr::kRows / 2;
  static constexpr int kMaxColumnRows = Instr::kMaxColumnRows;
  static_assert(kStretchQuads <= kMaxSums);

  static Int Zero() { return _mm256_setzero_si256(); }
  static Int Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void Store(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Int Broadcast(const int8_t* x) { return Micro256<Instr>::Broadcast(x); }
  static Int LoadLanes(const uint8_t* const* p, int step, int64_t offset) {
    const auto lane = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p[i * step] + offset));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
  }
  // Lane L of all four, one after the other, at out + L * stride.
  static void StoreLanes(const Int v[4], void* to, int64_t stride) {
    uint8_t* const out = static_cast<uint8_t*>(to);
    Store(out, _mm256_permute2x128_si256(v[0], v[1], 0x20));
    Store(out + 32, _mm256_permute2x128_si256(v[2], v[3], 0x20));
    Store(out + stride, _mm256_permute2x128_si256(v[0], v[1], 0x31));
    Store(out + stride + 32, _mm256_permute2x128_si256(v[2], v[3], 0x31));
  }

  static Int Add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int Sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int Splat(int32_t x) { return _mm256_set1_epi32(x); }
  static Int Scale(Int a, float scale) {
    return _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps(scale)));
  }
  static Int Set1(char x) { return _mm256_set1_epi8(x); }
  static Int And(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int Xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
  template <int kShift>
  static Int Srli(Int a) {
    return _mm256_srli_epi16(a, kShift);
  }
  template <int kShift>
  static Int Slli(Int a) {
    return _mm256_slli_epi16(a, kShift);
  }
  static Int UnpackLo8(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
  static Int UnpackHi8(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
  static Int UnpackLo16(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
  static Int UnpackHi16(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
  static Int UnpackLo32(Int a, Int b) { return _mm256_unpacklo_epi32(a, b); }
  static Int UnpackHi32(Int a, Int b) { return _mm256_unpackhi_epi32(a, b); }
  static Int UnpackLo64(Int a, Int b) { return _mm256_unpacklo_epi64(a, b); }
  static Int UnpackHi64(Int a, Int b) { return _mm256_unpackhi_epi64(a, b); }

  template <int>
  static Int Field(Int v, int f) {
    return Micro256<Instr>::Field(v, f);
  }
  static void Dot(Int& sum, Int codes, Int x) { sum = Instr::Add(sum, codes, x); }
  template <int>
  static Int Total(Int sum, int) {
    return Instr::Widen(sum);
  }
  static __m128i SumEach(const Int v[4]) {
    const Int v01 = Add(UnpackLo32(v[0], v[1]), UnpackHi32(v[0], v[1]));
    const Int v23 = Add(UnpackLo32(v[2], v[3]), UnpackHi32(v[2], v[3]));
    const Int all = Add(UnpackLo64(v01, v23), UnpackHi64(v01, v23));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
  // Writes first + i for each bit i of 16; returns how many.
  static int64_t ListBits(int bits, int64_t first, int32_t* list) {
    int32_t* const begin = list;
    for (; bits != 0; bits &= bits - 1) *list++ = static_cast<int32_t>(first) + __builtin_ctz(bits);
    return list - begin;
  }
  // Writes those of 16 bytes whose bit is set.
  static void Compress(int bits, const int8_t* x, int8_t* out) {
    for (; bits != 0; bits &= bits - 1) *out++ = x[__builtin_ctz(bits)];
  }
};

template <typename Instr>
static int64_t DotLoop256(int64_t iterations) {
  constexpr int kChains = 12;
  __m256i acc[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) acc[c] = _mm256_set1_epi32(c);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      acc[c] = Instr::Add(acc[c], acc[c], acc[c]);
      __asm__ volatile("" : "+x"(acc[c]));  // keep every one
    }
  }
  return iterations * kChains * 32;
}

}  // namespace ternion::kernels
