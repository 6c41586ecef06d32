// Ternary product with 512-bit dpbusd: one instruction multiplies 16 output rows x 4 columns of
// codes with a broadcast dword of activations.

#include <immintrin.h>

#include "kernels/cpu/ternary_blocking.h"
#include "kernels/cpu/ternary_columns.h"
#include "kernels/cpu/ternary_rows.h"

namespace ternion::kernels::avx512vnni {
namespace {

// Four activations, at any address.
struct __attribute__((packed, may_alias)) Dword {
  int32_t value;
};

// acc += codes . (four activations at x). In assembly because GCC neither folds the broadcast into
// the instruction nor keeps an accumulator that is used twice in a loop in one register.
inline void AddDot(__m512i& acc, __m512i codes, const int8_t* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(acc)
          : "v"(codes), "m"(*reinterpret_cast<const Dword*>(x)));
}

inline __mmask16 OutputMask(int num_outputs) {
  return static_cast<__mmask16>(num_outputs >= 16 ? 0xffff : (1 << num_outputs) - 1);
}

inline void StoreOutputs(const OutputTile& out, int row, float* y, __mmask16 mask, __m512i dot) {
  const __m512i sum = _mm512_set1_epi32(out.x_sums[row]);
  const __m512 scale = _mm512_set1_ps(out.weight_scale * out.x_scales[row]);
  const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, sum));
  _mm512_mask_storeu_ps(y, mask, _mm512_mul_ps(value, scale));
}

// The field f of 64 bytes. With kPlaces accumulators per row, f is left in place f % kPlaces (worth
// 4^place) and the accumulators are shifted once at the end: fewer shifts here, for more registers.
template <int kPlaces>
inline __m512i Field(__m512i block, int f) {
  const __m512i shifted = f < kPlaces ? block : _mm512_srli_epi32(block, f / kPlaces * kPlaces * 2);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>(3 << (f % kPlaces * 2))));
}

// acc += one block of codes . kRows rows of 16 activations at x. Codes are as in memory (kPacked)
// or as Unpack leaves them.
template <bool kPacked, int kRows, int kPlaces>
__attribute__((always_inline)) inline void AddBlock(__m512i (&acc)[kRows][kPlaces],
                                                    const uint8_t* codes, const int8_t* x) {
  __m512i fields[kNumFields];
  if constexpr (kPacked) {
    const __m512i block = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f) fields[f] = Field<kPlaces>(block, f);
  } else {
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f) fields[f] = _mm512_load_si512(codes + 64 * f);
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f) {
      AddDot(acc[r][f % kPlaces], fields[f], x + 16 * r + 4 * f);
    }
}

// Every kTurns-th block adds to the same accumulators: one row alone has too few chains of
// additions to keep the multipliers busy.
template <int kRows, int kPlaces, int kTurns>
__attribute__((noinline)) void StreamRows(const StreamArgs& a) {
  __m512i acc[kTurns][kRows][kPlaces];
#pragma GCC unroll 2
  for (int t = 0; t < kTurns; ++t)
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < kPlaces; ++p) acc[t][r][p] = _mm512_setzero_si512();

  Ahead ahead = *a.ahead;
  const uint8_t* codes = a.codes;
  const int8_t* x = a.x;
  const uint8_t* const end = codes + 64 * a.num_blocks;
  for (; codes + 64 * (kTurns - 1) < end; codes += 64 * kTurns, x += 16 * kRows * kTurns) {
#pragma GCC unroll 2
    for (int t = 0; t < kTurns; ++t) {
      ahead.Fetch();
      AddBlock<true>(acc[t], codes + 64 * t, x + 16 * kRows * t);
    }
  }
  if (codes < end) AddBlock<true>(acc[0], codes, x);
  *a.ahead = ahead;

  const __mmask16 mask = OutputMask(a.out.num_outputs);
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    __m512i dot = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int t = 0; t < kTurns; ++t)
#pragma GCC unroll 4
      for (int p = 0; p < kPlaces; ++p) {
        dot = _mm512_add_epi32(dot, _mm512_srai_epi32(acc[t][r][p], 2 * p));
      }
    StoreOutputs(a.out, r, a.out.y + r * a.out.y_stride, mask, dot);
  }
}

template <int kRows>
__attribute__((noinline)) void TileRows(const TileArgs& a) {
  const __mmask16 mask = OutputMask(a.out.num_outputs);
  __m512i acc[kRows][1];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    const float* y = a.out.y + r * a.out.y_stride;
    acc[r][0] = a.first ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi32(mask, y);
  }
  const uint8_t* codes = a.unpacked;
  const int8_t* x = a.x;
  const uint8_t* const end = codes + kUnpackedBlockSize * a.num_blocks;
  for (; codes < end; codes += kUnpackedBlockSize, x += 16 * kRows) AddBlock<false>(acc, codes, x);
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    float* y = a.out.y + r * a.out.y_stride;
    if (a.last) {
      StoreOutputs(a.out, r, y, mask, acc[r][0]);
    } else {
      _mm512_mask_storeu_epi32(y, mask, acc[r][0]);
    }
  }
}

struct Micro {
  static constexpr int kMaxStreamedRows = 48;
  static constexpr int kStreamRows = 24;
  static constexpr int kTileRows = 24;

  // Accumulators: 4 places x 7 rows, 2 x 12 or 1 x 24, within 32 registers.
  template <int kRows = kStreamRows>
  static void Stream(const StreamArgs& a) {
    constexpr int kPlaces = kRows <= 7 ? 4 : kRows <= 12 ? 2 : 1;
    constexpr int kTurns = kRows == 1 ? 2 : 1;
    if (a.out.num_rows == kRows) {
      StreamRows<kRows, kPlaces, kTurns>(a);
    } else if constexpr (kRows > 1) {
      Stream<kRows - 1>(a);
    }
  }

  static void Unpack(const uint8_t* codes, int64_t num_blocks, uint8_t* out) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      const __m512i block = _mm512_loadu_si512(codes + 64 * b);
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        _mm512_store_si512(out + 64 * (kNumFields * b + f), Field<1>(block, f));
      }
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
};

// See ternary_lines.h. Fields stay in place.
struct Vec {
  using Int = __m512i;
  static constexpr int kBytes = 64;
  static constexpr int64_t kMaxSums = int64_t{1} << 30;
  static constexpr int kRegisterSums = 24;
  static constexpr int kLineRows = 4;
  static constexpr int kMaxColumnRows = 48;

  static Int Zero() { return _mm512_setzero_si512(); }
  static Int Load(const void* p) { return _mm512_loadu_si512(p); }
  static void Store(void* p, Int v) { _mm512_storeu_si512(p, v); }
  static Int Broadcast(const int8_t* x) {
    return _mm512_set1_epi32(reinterpret_cast<const Dword*>(x)->value);
  }
  // Lane L: 16 bytes at p[L * step] + offset.
  static Int LoadLanes(const uint8_t* const* p, int step, int64_t offset) {
    const auto lane = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p[i * step] + offset));
    };
    Int v = _mm512_castsi128_si512(lane(0));
    v = _mm512_inserti32x4(v, lane(1), 1);
    v = _mm512_inserti32x4(v, lane(2), 2);
    return _mm512_inserti32x4(v, lane(3), 3);
  }
  // Lane L of all four, one after the other, at out + L * stride.
  static void StoreLanes(const Int v[4], void* to, int64_t stride) {
    uint8_t* const out = static_cast<uint8_t*>(to);
    const Int low01 = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
    const Int low23 = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const Int high01 = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const Int high23 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    Store(out, _mm512_shuffle_i32x4(low01, low23, 0x88));
    Store(out + stride, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    Store(out + 2 * stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    Store(out + 3 * stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }

  static Int Add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int Sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int Splat(int32_t x) { return _mm512_set1_epi32(x); }
  static Int Scale(Int a, float scale) {
    return _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(scale)));
  }
  static Int Set1(char x) { return _mm512_set1_epi8(x); }
  static Int And(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int Xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
  template <int kShift>
  static Int Srli(Int a) {
    return _mm512_srli_epi16(a, kShift);
  }
  template <int kShift>
  static Int Slli(Int a) {
    return _mm512_slli_epi16(a, kShift);
  }
  static Int UnpackLo8(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
  static Int UnpackHi8(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
  static Int UnpackLo16(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
  static Int UnpackHi16(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
  static Int UnpackLo32(Int a, Int b) { return _mm512_unpacklo_epi32(a, b); }
  static Int UnpackHi32(Int a, Int b) { return _mm512_unpackhi_epi32(a, b); }
  static Int UnpackLo64(Int a, Int b) { return _mm512_unpacklo_epi64(a, b); }
  static Int UnpackHi64(Int a, Int b) { return _mm512_unpackhi_epi64(a, b); }

  template <int kPlaces>
  static Int Field(Int v, int f) {
    return avx512vnni::Field<kPlaces>(v, f);
  }
  static void Dot(Int& sum, Int codes, Int x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));  // see AddDot
  }
  template <int kPlaces>
  static Int Total(Int sum, int f) {
    return _mm512_srai_epi32(sum, 2 * (f % kPlaces));
  }
  // The sum of all lanes of each of four vectors.
  static __m128i SumEach(const Int v[4]) {
    const Int v01 = Add(UnpackLo32(v[0], v[1]), UnpackHi32(v[0], v[1]));
    const Int v23 = Add(UnpackLo32(v[2], v[3]), UnpackHi32(v[2], v[3]));
    const Int all = Add(UnpackLo64(v01, v23), UnpackHi64(v01, v23));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
  // Writes first + i for each bit i of 16; returns how many. May write 16.
  static int64_t ListBits(int bits, int64_t first, int32_t* list) {
    const __m512i all =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all));
    return __builtin_popcount(bits);
  }
  // Writes those of 16 bytes whose bit is set, and zeros up to 16.
  static void Compress(int bits, const int8_t* x, int8_t* out) {
    const __m512i all = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    const __m512i some = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(some));
  }
};

}  // namespace

void RunPanels(const TernaryRun& run) { RunPanelsWith<Micro>(run); }
void RunRows(const TernaryRun& run) { RunRowsWith<Micro, Vec>(run); }
void RunColumns(const TernaryRun& run) { RunColumnsWith<Micro, Vec>(run); }

int64_t DotLoop(int64_t iterations) {
  constexpr int kChains = 24;
  __m512i acc[kChains];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_epi32(c);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) {
      acc[c] = _mm512_dpbusd_epi32(acc[c], acc[c], acc[c]);
      __asm__ volatile("" : "+v"(acc[c]));  // keep every one
    }
  }
  return iterations * kChains * 64;
}

}  // namespace ternion::kernels::avx512vnni
