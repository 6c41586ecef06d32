// Ternary product with 256-bit vectors, shared by the AVX2 and AVX-VNNI variants. A block of codes
// is two halves of 8 output rows x 4 columns per 2-bit field. Instr is how the variant multiplies:
//
//   kMaxSums              dot products that a Partial can take before it must be widened
//   Add(Partial, codes, activations), Widen(Partial) -> int32 lanes
//
// Included by files compiled for one instruction set (see variants.h).
#pragma once

#include <immintrin.h>

#include "kernels/cpu/ternary_blocking.h"

namespace ternion::kernels {

template <typename Instr>
struct Micro256 {
  static constexpr int kFields = 4;  // 2-bit fields in a byte; field f holds columns 4f .. 4f+3
  static constexpr int kHalves = 2;
  static constexpr int kStreamRows = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kTilePanels = 1;
  static constexpr int kPrefetchBytes = 64 * 96;
  static constexpr int64_t kMaxBlocks = Instr::kMaxSums / kFields;  // between two widenings

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

  // float(dot - sum) * scale for 8 outputs of one row.
  static void StoreOutputs(float* y, __m256i mask, __m256i dot, int32_t sum, float scale) {
    const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, _mm256_set1_epi32(sum)));
    _mm256_maskstore_ps(y, mask, _mm256_mul_ps(value, _mm256_set1_ps(scale)));
  }

  // sums += fields of `num_blocks` <= kMaxBlocks blocks times kRows rows. The codes are packed
  // (kPacked) or one byte each, in the order of Unpack.
  template <int kRows, bool kPacked>
  static void AddBlocks(const uint8_t* codes, int64_t num_blocks, const int8_t* x, int64_t x_stride,
                        __m256i sums[kRows][kHalves]) {
    __m256i partial[kRows][kHalves];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < kHalves; ++h) partial[r][h] = _mm256_setzero_si256();

    for (int64_t b = 0; b < num_blocks; ++b) {
      if constexpr (kPacked) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes), _MM_HINT_T0);
      }
      const __m256i low = Load(codes), high = Load(codes + 32);
#pragma GCC unroll 4
      for (int f = 0; f < kFields; ++f) {
        const uint8_t* field = codes + 64 * f;
        const __m256i half[kHalves] = {kPacked ? Field(low, f) : Load(field),
                                       kPacked ? Field(high, f) : Load(field + 32)};
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m256i four = Broadcast(x + r * x_stride + 4 * f);
#pragma GCC unroll 2
          for (int h = 0; h < kHalves; ++h)
            partial[r][h] = Instr::Add(partial[r][h], half[h], four);
        }
      }
      codes += kPacked ? kPackedBlockBytes : kUnpackedBlockBytes;
      x += kRowsPerPanel;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        sums[r][h] = _mm256_add_epi32(sums[r][h], Instr::Widen(partial[r][h]));
      }
  }

  template <int kRows, bool kPacked>
  static void AddAllBlocks(const uint8_t* codes, int64_t num_blocks, const int8_t* x,
                           int64_t x_stride, __m256i sums[kRows][kHalves]) {
    for (int64_t b = 0; b < num_blocks; b += kMaxBlocks) {
      AddBlocks<kRows, kPacked>(codes + b * (kPacked ? kPackedBlockBytes : kUnpackedBlockBytes),
                                Min(kMaxBlocks, num_blocks - b), x + b * kRowsPerPanel, x_stride,
                                sums);
    }
  }

  template <int kRows>
  __attribute__((noinline)) static void StreamRowsOf(const StreamArgs& a) {
    __m256i sums[kRows][kHalves] = {};
    AddAllBlocks<kRows, true>(a.codes, a.num_blocks, a.x, a.x_stride, sums);
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < kHalves; ++h) {
        StoreOutputs(a.y + r * a.y_stride + 8 * h, Mask(a.num_outputs, h), sums[r][h], a.x_sums[r],
                     a.weight_scale * a.x_scales[r]);
      }
  }

  template <int kRows>
  __attribute__((noinline)) static void TileRowsOf(const TileArgs& a) {
    __m256i sums[kRows][kHalves] = {};
    for (int r = 0; r < kRows && !a.first; ++r)
      for (int h = 0; h < kHalves; ++h) {
        const float* y = a.y + r * a.y_stride + 8 * h;
        sums[r][h] = _mm256_maskload_epi32(reinterpret_cast<const int*>(y), Mask(a.num_outputs, h));
      }
    AddAllBlocks<kRows, false>(a.unpacked, a.num_blocks, a.x, a.x_stride, sums);
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < kHalves; ++h) {
        float* y = a.y + r * a.y_stride + 8 * h;
        const __m256i mask = Mask(a.num_outputs, h);
        if (a.last) {
          StoreOutputs(y, mask, sums[r][h], a.x_sums[r], a.weight_scale * a.x_scales[r]);
        } else {
          _mm256_maskstore_epi32(reinterpret_cast<int*>(y), mask, sums[r][h]);
        }
      }
  }

  template <int kRows = kStreamRows>
  static void Stream(const StreamArgs& a) {
    if (a.num_rows == kRows) {
      StreamRowsOf<kRows>(a);
    } else if constexpr (kRows > 1) {
      Stream<kRows - 1>(a);
    }
  }

  static void Unpack(const uint8_t* codes, int64_t num_blocks, uint8_t* out) {
    for (int64_t half = 0; half < kHalves * num_blocks; ++half) {
      const __m256i block = Load(codes + 32 * half);
      uint8_t* to = out + half / kHalves * kUnpackedBlockBytes + half % kHalves * 32;
#pragma GCC unroll 4
      for (int f = 0; f < kFields; ++f) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * f), Field(block, f));
      }
    }
  }

  template <int kRows = kTileRows>
  static void Tile(const TileArgs& a) {
    if (a.num_rows == kRows) {
      TileRowsOf<kRows>(a);
    } else if constexpr (kRows > 1) {
      Tile<kRows - 1>(a);
    }
  }
};

// Rows from which on unpacking into cache pays.
template <typename Instr>
static void RunPanels256(const PanelRun& run) {
  if (run.num_rows <= 2 * Micro256<Instr>::kStreamRows) {
    StreamPanels<Micro256<Instr>>(run);
  } else {
    TilePanels<Micro256<Instr>>(run);
  }
}

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
