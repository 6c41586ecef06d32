// Ternary products with lines of outputs (kRows). A few rows multiply the wanted lines as they lie;
// more turn them into panels, 16 lines at a time, wherever they are. For Vec, see ternary_lines.h.
//
// Included by files compiled for one instruction set: no std::, nothing inline from other headers.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/ternary_lines.h"

namespace ternion::kernels {

constexpr int64_t kMaxListed = 4096;  // outputs, at a time

// Bytes [begin, end) of 16 listed lines, as blocks of a panel; whole vectors.
template <typename Vec>
static inline void MakePanel(const TernaryRun& run, const int32_t* list, int64_t begin, int64_t end,
                             uint8_t* out) {
  constexpr int64_t kLanes = Vec::kBytes / 16;
  const uint8_t* lines[kPanelOutputs];
  for (int i = 0; i < kPanelOutputs; ++i) lines[i] = run.codes + list[i] * run.stride_bytes;
  for (; begin < end; begin += 16, out += 4 * kBlockSize) {
#pragma GCC unroll 2
    for (int part = 0; part < kPanelOutputs; part += 4 * kLanes) {  // of a block
      typename Vec::Int v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = Vec::LoadLanes(lines + part + i, 4, begin);
      const auto low01 = Vec::UnpackLo32(v[0], v[1]), low23 = Vec::UnpackLo32(v[2], v[3]);
      const auto high01 = Vec::UnpackHi32(v[0], v[1]), high23 = Vec::UnpackHi32(v[2], v[3]);
      uint8_t* const to = out + 4 * part;
      Vec::Store(to, Vec::UnpackLo64(low01, low23));
      Vec::Store(to + kBlockSize, Vec::UnpackHi64(low01, low23));
      Vec::Store(to + 2 * kBlockSize, Vec::UnpackLo64(high01, high23));
      Vec::Store(to + 3 * kBlockSize, Vec::UnpackHi64(high01, high23));
    }
  }
}

// For TilePanels: blocks of any panel, all of its lines.
template <typename Vec>
struct RowBlocks {
  static const uint8_t* Get(const TernaryRun& run, int64_t panel, int64_t block_begin,
                            int64_t num_blocks, uint8_t* scratch) {
    constexpr int64_t kBlocks = 4;  // made at a time
    int32_t list[kPanelOutputs];
    for (int i = 0; i < kPanelOutputs; ++i) list[i] = static_cast<int32_t>(panel) * 16 + i;
    const int64_t first = block_begin / kBlocks * kBlocks;
    MakePanel<Vec>(run, list, 4 * first, 4 * (block_begin + num_blocks), scratch);
    return scratch + (block_begin - first) * kBlockSize;
  }
};

// Bit i: the gate of output 16 * panel + i is above 0 or NaN in some row.
static inline int LiveOutputs(const TernaryRun& run, int64_t panel) {
  const int64_t first = panel * kPanelOutputs, count = Min(kPanelOutputs, run.num_outputs - first);
  const int all = kAllLive >> (kPanelOutputs - count);
  if (run.gate == nullptr) return all;
  int live = 0;
  const float* gate = run.gate + first;
  for (int64_t r = 0; r < run.num_rows && live != all; ++r, gate += run.y_stride) {
    if (count < kPanelOutputs) {
      for (int i = 0; i < count; ++i) live |= (gate[i] <= 0 ? 0 : 1) << i;
      continue;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPanelOutputs; i += 4) {
      const __m128 above = _mm_cmpnle_ps(_mm_loadu_ps(gate + i), _mm_setzero_ps());
      live |= _mm_movemask_ps(above) << i;
    }
  }
  return live;
}

// Lists live outputs from those of panel `*panel` on, as many as fit, and moves `*panel`. Repeats
// the last: loops walk whole steps and look ahead.
template <typename Vec>
static int64_t ListOutputs(const TernaryRun& run, int64_t* panel, int32_t* list) {
  int64_t count = 0;
  for (; *panel < NumPanels(run) && count + kPanelOutputs <= kMaxListed; ++*panel) {
    count += Vec::ListBits(LiveOutputs(run, *panel), *panel * kPanelOutputs, list + count);
  }
  for (int i = 0; i < kPanelOutputs && count > 0; ++i) list[count + i] = list[count - 1];
  return count;
}

// A few rows: dot products of lines as they lie. x in the order in which fields want it:
// [vector of a line][field][granule][4].
template <typename Vec>
static inline void ArrangeInputs(const TernaryRun& run, int64_t row, int8_t* out) {
  constexpr int64_t kGranules = Vec::kBytes / 4;
  const int8_t* x = run.x + row * run.x_stride;
  for (int64_t g = 0; g < run.stride_bytes / 4; ++g, x += kBlockInputs) {
    int8_t* to = out + g / kGranules * (kNumFields * Vec::kBytes) + g % kGranules * 4;
    for (int f = 0; f < kNumFields; ++f, to += Vec::kBytes) {
      if (g < run.num_blocks) {
        __builtin_memcpy(to, x + 4 * f, 4);
      } else {
        __builtin_memset(to, 0, 4);
      }
    }
  }
}

// total[row][line] += bytes [begin, end) of four lines times all rows of x [kRows, x_stride]. Field
// f goes to sum f % kSums.
template <typename Vec, int kRows, int kSums>
static inline void DotLines(const uint8_t* const lines[4], const uint8_t* const ahead[4],
                            int64_t begin, int64_t end, const int8_t* x, int64_t x_stride,
                            typename Vec::Int total[kRows][4]) {
  using Int = typename Vec::Int;
  Int sum[kRows][4][kSums];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sum[r][l][s] = Vec::Zero();
  x += kNumFields * begin;
  for (int64_t at = begin; at < end; at += Vec::kBytes, x += kNumFields * Vec::kBytes) {
    Int v[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead[l] + at), _MM_HINT_T0);
      v[l] = Vec::Load(lines[l] + at);
    }
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f) {
      Int field[4];
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) field[l] = Vec::template Field<kSums>(v[l], f);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Int four = Vec::Load(x + r * x_stride + f * Vec::kBytes);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) Vec::Dot(sum[r][l][f % kSums], field[l], four);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) {
        total[r][l] = Vec::Add(total[r][l], Vec::template Total<kSums>(sum[r][l][s], s));
      }
}

template <typename Vec, int kRows, int kSums>
static void DotListed(const TernaryRun& run, const int32_t* list, int64_t count, const int8_t* x) {
  constexpr int64_t kAhead = 8;  // lines
  constexpr int64_t kMaxBytes = Vec::kMaxSums / (kNumFields / kSums) * Vec::kBytes;
  const int64_t x_stride = kNumFields * run.stride_bytes;
  for (int64_t i = 0; i < count; i += 4) {
    const uint8_t* lines[4];
    const uint8_t* ahead[4];
    for (int l = 0; l < 4; ++l) {
      lines[l] = run.codes + list[i + l] * run.stride_bytes;
      ahead[l] = run.codes + list[i + l + kAhead] * run.stride_bytes;
    }
    typename Vec::Int total[kRows][4] = {};
    for (int64_t b = 0; b < run.stride_bytes; b += kMaxBytes) {
      DotLines<Vec, kRows, kSums>(lines, ahead, b, Min(b + kMaxBytes, run.stride_bytes), x,
                                  x_stride, total);
    }
    for (int r = 0; r < kRows; ++r) {
      const __m128i dot = _mm_sub_epi32(Vec::SumEach(total[r]), _mm_set1_epi32(run.x_sums[r]));
      const __m128 scale = _mm_set1_ps(run.weight_scale * run.x_scales[r]);
      const __m128 values = _mm_mul_ps(_mm_cvtepi32_ps(dot), scale);
      for (int l = 0; l < 4; ++l) run.y[r * run.y_stride + list[i + l]] = values[l];
    }
  }
}

// Lines so short, in bytes, that summing across lanes costs more than skipping saves: for several
// lines at once, and for several rows, which go through panels instead.
constexpr int64_t kShortLine = 128;
constexpr int64_t kMiddleLine = 256;

template <typename Vec, int kRows = Vec::kLineRows>
static void DotListedRows(const TernaryRun& run, const int32_t* list, int64_t count,
                          const int8_t* x) {
  constexpr int kSums = Vec::kRegisterSums / kRows >= 16  ? 4
                        : Vec::kRegisterSums / kRows >= 8 ? 2
                                                          : 1;
  if (run.num_rows < kRows) {
    if constexpr (kRows > 1) DotListedRows<Vec, kRows - 1>(run, list, count, x);
  } else if (run.stride_bytes <= kShortLine) {
    DotListed<Vec, kRows, 1>(run, list, count, x);
  } else {
    DotListed<Vec, kRows, kSums>(run, list, count, x);
  }
}

// More rows: the first `count` of 16 listed outputs from panel `codes`. They go to y through
// `scratch`, unless they are adjacent.
template <typename Micro>
static void StreamListed(const TernaryRun& run, const uint8_t* codes, const int8_t* x, Ahead& ahead,
                         const int32_t* list, int64_t count, float* scratch) {
  OutputTile out = {run.y + list[0],  run.y_stride, 0,         kPanelOutputs,
                    run.weight_scale, run.x_scales, run.x_sums};
  const bool adjacent = count == kPanelOutputs && list[kPanelOutputs - 1] - list[0] == count - 1;
  if (!adjacent) {
    out.y = scratch;
    out.y_stride = kPanelOutputs;
  }
  StreamPanel<Micro>(run, codes, x, ahead, out);
  for (int64_t r = 0; r < run.num_rows && !adjacent; ++r) {
    float* const y = run.y + r * run.y_stride;
    for (int64_t i = 0; i < count; ++i) y[list[i]] = scratch[r * kPanelOutputs + i];
  }
}

template <typename Micro, typename Vec>
static void StreamListedRows(const TernaryRun& run, const int32_t* list, int64_t count,
                             const int8_t* x, uint8_t* panel, float* scratch) {
  const int64_t distance = (kStreamAhead / run.stride_bytes + 15) / kPanelOutputs * kPanelOutputs;
  Ahead ahead = {nullptr, nullptr, run.codes, run.stride_bytes, run.stride_bytes};
  for (int64_t i = 0; i < count; i += kPanelOutputs) {
    ahead.Start(list + i + distance, Min(kPanelOutputs, count - i - distance));
    MakePanel<Vec>(run, list + i, 0, run.stride_bytes, panel);
    StreamListed<Micro>(run, panel, x, ahead, list + i, Min(kPanelOutputs, count - i), scratch);
  }
}

// Some rows of a run.
static inline TernaryRun SliceRows(const TernaryRun& run, int64_t begin, int64_t count) {
  TernaryRun rows = run;
  rows.x += begin * run.x_stride;
  rows.x_scales += begin;
  rows.x_sums += begin;
  rows.num_rows = count;
  rows.y += begin * run.y_stride;
  if (run.gate != nullptr) rows.gate += begin * run.y_stride;
  return rows;
}

// Whether a row wants, on average, less than a fifth of what some row wants: then rows alone take
// less time than together.
static inline bool RowsAreFasterAlone(const TernaryRun& run) {
  if (run.gate == nullptr || run.stride_bytes <= kMiddleLine) return false;
  int64_t any = 0, each = 0;
  for (int64_t p = 0; p < NumPanels(run); ++p) {
    any += __builtin_popcount(LiveOutputs(run, p));
    for (int64_t r = 0; r < run.num_rows; ++r) {
      each += __builtin_popcount(LiveOutputs(SliceRows(run, r, 1), p));
    }
  }
  return 5 * each < run.num_rows * any;
}

// Where RunRowsWith keeps things in scratch; a panel and activations follow.
struct alignas(64) RowScratch {
  float y[kListedRows * kPanelOutputs];      // of listed outputs
  int32_t list[kMaxListed + kPanelOutputs];  // see ListOutputs
};

template <typename Micro, typename Vec>
static void RunRowsWith(const TernaryRun& run) {
  const int64_t panel_size = kPanelOutputs * run.stride_bytes;
  const int64_t x_size = run.num_rows * kNumFields * run.stride_bytes;
  const int64_t size = static_cast<int64_t>(sizeof(RowScratch)) + panel_size + x_size;
  if (run.num_rows > kListedRows || size > kScratchSize) {
    return TilePanels<Micro, RowBlocks<Vec>>(run);
  }
  const bool few = run.num_rows <= (run.stride_bytes <= kMiddleLine ? 1 : Vec::kLineRows);
  if (!few && RowsAreFasterAlone(run)) {
    for (int64_t r = 0; r < run.num_rows; ++r) RunRowsWith<Micro, Vec>(SliceRows(run, r, 1));
    return;
  }
  RowScratch& s = *reinterpret_cast<RowScratch*>(run.scratch);
  uint8_t* const panel = run.scratch + sizeof(RowScratch);
  int8_t* const x = reinterpret_cast<int8_t*>(panel + panel_size);
  for (int64_t r = 0; few && r < run.num_rows; ++r) {
    ArrangeInputs<Vec>(run, r, x + r * kNumFields * run.stride_bytes);
  }
  if (!few) {
    InterleaveRows(run.x, run.x_stride, run.num_rows, Micro::kStreamRows, run.num_blocks, x);
  }
  for (int64_t p = 0; p < NumPanels(run);) {
    const int64_t count = ListOutputs<Vec>(run, &p, s.list);
    few ? DotListedRows<Vec>(run, s.list, count, x)
        : StreamListedRows<Micro, Vec>(run, s.list, count, x, panel, s.y);
  }
}

}  // namespace ternion::kernels
