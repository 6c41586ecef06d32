// Ternary products with matrices whose codes lie in lines, an output's (kRows) or an input's
// (kColumns): few rows of activations skip the lines that add nothing; many turn lines into panels
// first, 16 at a time. Vec is a vector of 2 or 4 lanes of 128 bits and how the variant multiplies
// with it, a type of internal linkage of one ternary_<variant>.cc:
//
//   Field<k>(v, f)       2-bit field f of every byte, worth 4^(f % k) when fields may stay in place
//   Dot(sum, codes, x)   sum += four codes times four activations, in every dword
//   kMaxSums             so many Dots fit into a sum
//   Total<k>(sum, f)     int32 lanes of a sum over fields f, worth 1 again
//   kColumnSums          sums that AddColumns may hold in registers, 8 or 16
//   kMaxLineSums         sums per line in long lines
//
// Included by files compiled for one instruction set: no std::, nothing inline from other headers.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/ternary_blocking.h"

namespace ternion::kernels {

constexpr int kNumFields = 4;  // 2-bit fields in a byte
constexpr int64_t kMaxInputs = 65536;

// --- Lines to panels

template <typename Vec, int kShift>
static inline void SwapBits(typename Vec::Int& a, typename Vec::Int& b, char mask) {
  const auto differ = Vec::And(Vec::Xor(Vec::template Srli<kShift>(a), b), Vec::Set1(mask));
  a = Vec::Xor(a, Vec::template Slli<kShift>(differ));
  b = Vec::Xor(b, differ);
}

// Field i of v[f] becomes field f of v[i].
template <typename Vec>
static inline void SwapFields(typename Vec::Int& v0, typename Vec::Int& v1, typename Vec::Int& v2,
                              typename Vec::Int& v3) {
  SwapBits<Vec, 4>(v0, v2, 0x0f);
  SwapBits<Vec, 4>(v1, v3, 0x0f);
  SwapBits<Vec, 2>(v0, v1, 0x33);
  SwapBits<Vec, 2>(v2, v3, 0x33);
}

// Bytes of four vectors, one after the other: dword 4L + q of the four lines (lane L of each)
// becomes lane L of out[q], byte j of dword i being byte i of line j.
template <typename Vec>
static inline void InterleaveBytes(const typename Vec::Int line[4], typename Vec::Int out[4]) {
  const auto low01 = Vec::UnpackLo8(line[0], line[1]), low23 = Vec::UnpackLo8(line[2], line[3]);
  const auto high01 = Vec::UnpackHi8(line[0], line[1]), high23 = Vec::UnpackHi8(line[2], line[3]);
  out[0] = Vec::UnpackLo16(low01, low23);
  out[1] = Vec::UnpackHi16(low01, low23);
  out[2] = Vec::UnpackLo16(high01, high23);
  out[3] = Vec::UnpackHi16(high01, high23);
}

// Four lines' 64 bytes or less, and a hint that those `ahead` of them come next.
template <typename Vec>
static inline void LoadLines(const uint8_t* line, int64_t stride, int64_t ahead,
                             typename Vec::Int out[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, line += stride) {
    _mm_prefetch(reinterpret_cast<const char*>(line + ahead), _MM_HINT_T1);
    out[i] = Vec::Load(line);
  }
}

// Blocks of panel `panel`, columns from 16 * block_begin on, from 16 lines of outputs.
template <typename Vec>
struct RowBlocks {
  static constexpr int64_t ScratchSize(int64_t num_blocks) {
    constexpr int64_t kBlocks = Vec::kBytes / 4;  // in a vector
    return (num_blocks + kBlocks - 1) / kBlocks * kBlocks * kBlockSize;
  }

  static const uint8_t* Get(const TernaryRun& run, int64_t panel, int64_t block_begin,
                            int64_t num_blocks, uint8_t* scratch) {
    constexpr int64_t kBlocks = Vec::kBytes / 4;  // in a vector
    const uint8_t* lines = run.codes + panel * kPanelOutputs * run.stride_bytes;
    const int64_t first = block_begin / kBlocks * kBlocks;
    for (int64_t b = first; b < block_begin + num_blocks; b += kBlocks) {
      for (int r = 0; r < kPanelOutputs; r += 4) {
        Transpose(lines + r * run.stride_bytes + 4 * b, run.stride_bytes,
                  scratch + (b - first) * kBlockSize + 4 * r);
      }
    }
    return scratch + (block_begin - first) * kBlockSize;
  }

 private:
  // Four lines' dwords, side by side in every block.
  static void Transpose(const uint8_t* line, int64_t stride, uint8_t* out) {
    typename Vec::Int v[4];
    LoadLines<Vec>(line, stride, kPanelOutputs * stride, v);
    const auto low01 = Vec::UnpackLo32(v[0], v[1]), low23 = Vec::UnpackLo32(v[2], v[3]);
    const auto high01 = Vec::UnpackHi32(v[0], v[1]), high23 = Vec::UnpackHi32(v[2], v[3]);
    constexpr int64_t kStep = 4 * kBlockSize;
    Vec::StoreLanes(Vec::UnpackLo64(low01, low23), out, kStep);
    Vec::StoreLanes(Vec::UnpackHi64(low01, low23), out + kBlockSize, kStep);
    Vec::StoreLanes(Vec::UnpackLo64(high01, high23), out + 2 * kBlockSize, kStep);
    Vec::StoreLanes(Vec::UnpackHi64(high01, high23), out + 3 * kBlockSize, kStep);
  }
};

// The same from lines of inputs: 16 panels share a line, and are made together.
template <typename Vec>
struct ColumnBlocks {
  static constexpr int64_t ScratchSize(int64_t num_blocks) {
    return kLinePanels * PanelSize(num_blocks);
  }

  static const uint8_t* Get(const TernaryRun& run, int64_t panel, int64_t block_begin,
                            int64_t num_blocks, uint8_t* scratch) {
    const int64_t panel_size = PanelSize(num_blocks);
    for (int64_t b = 0; panel % kLinePanels == 0 && b < num_blocks; ++b) {
      const uint8_t* lines =
          run.codes + (block_begin + b) * kBlockInputs * run.stride_bytes + 4 * panel;
      for (int64_t at = 0; at < 64; at += Vec::kBytes) {
        Transpose(lines + at, run.stride_bytes, scratch + at / 4 * panel_size + b * kBlockSize,
                  panel_size);
      }
    }
    return scratch + panel % kLinePanels * panel_size;
  }

 private:
  // One more block, so that panels do not fall into the same cache sets.
  static constexpr int64_t PanelSize(int64_t num_blocks) { return (num_blocks + 1) * kBlockSize; }

  static void Transpose(const uint8_t* lines, int64_t stride, uint8_t* out, int64_t panel_size) {
    typename Vec::Int v[kNumFields][4];
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f, lines += 4 * stride) {
      typename Vec::Int line[4];
      LoadLines<Vec>(lines, stride, 64, line);
      InterleaveBytes<Vec>(line, v[f]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q, out += panel_size) {
      SwapFields<Vec>(v[0][q], v[1][q], v[2][q], v[3][q]);
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) Vec::StoreLanes(v[f][q], out + 16 * f, 4 * panel_size);
    }
  }
};

// --- Lists of lines

// Pads lists of lines to whole steps of the loops that walk them, and of those that prefetch.
constexpr int64_t kListPad = 512;

// Repeats the last of `count` entries kListPad times.
static inline void PadList(int32_t* list, int64_t count) {
  const int32_t last = count > 0 ? list[count - 1] : 0;
  for (int64_t i = 0; i < kListPad; ++i) list[count + i] = last;
}

// Bit i: x[k + i] is not 0.
static inline int LiveInputs(const TernaryRun& run, int64_t row, int64_t k) {
  const __m128i x = _mm_loadu_si128(
      reinterpret_cast<const __m128i*>(run.x + row * run.x_stride + k * kBlockInputs));
  return ~_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())) & 0xffff;
}

// Bit i: the gate of output 16 * panel + i is above 0 or NaN.
static inline int LiveOutputs(const TernaryRun& run, int64_t row, int64_t panel) {
  const int64_t first = panel * kPanelOutputs;
  const float* gate = run.gate + row * run.y_stride + first;
  int live = 0;
  if (first + kPanelOutputs > run.num_outputs) {
    for (int i = 0; first + i < run.num_outputs; ++i) live |= (gate[i] <= 0 ? 0 : 1) << i;
    return live;
  }
  for (int i = 0; i < kPanelOutputs; i += 4) {
    const __m128 above = _mm_cmpnle_ps(_mm_loadu_ps(gate + i), _mm_setzero_ps());
    live |= _mm_movemask_ps(above) << i;
  }
  return live;
}

// Whether working row by row on live lines only is faster than on panels made of all lines;
// `live(row, i)` has the bits of lines 16 i .. 16 i + 15 of `num_groups` groups. Measured: with all
// lines alive a row costs 1, and n rows with panels cost about 4/3 + n/6.
template <typename Live>
static inline bool SparseIsFaster(const TernaryRun& run, int64_t num_groups, const Live& live) {
  constexpr int64_t kMaxSparseRows = 64;  // do not even count for more
  constexpr int64_t kRowCost = 96;        // lines: listing and arranging inputs takes as long
  if (run.num_rows > kMaxSparseRows) return false;
  if (run.num_rows == 1) return true;
  const int64_t budget = num_groups * 16 * (8 + run.num_rows) / 6;
  int64_t count = 0;
  for (int64_t r = 0; r < run.num_rows && count <= budget; ++r) {
    count += kRowCost;
    for (int64_t i = 0; i < num_groups; ++i) count += __builtin_popcount(live(run, r, i));
  }
  return count <= budget;
}

// --- Inputs that are not 0

// out [ceil(count / 4), 4]: the listed activations; 0 past them.
static inline void GatherInputs(const int8_t* x, const int32_t* list, int64_t count, int8_t* out) {
  int64_t i = 0;
  for (; i < count; ++i) out[i] = x[list[i]];
  for (; i % 4 != 0; ++i) out[i] = 0;
}

// Walks the outputs' bytes of listed columns, one column after the other, ahead of the products:
// memory is fastest when lines are fetched in their order.
struct ColumnCursor {
  const uint8_t* codes;
  int64_t stride;
  int64_t bytes;  // of each column
  const int32_t* list = nullptr;
  const uint8_t* at = nullptr;
  const uint8_t* end = nullptr;

  void Start(const int32_t* first) {
    list = first;
    at = codes + *list * stride;
    end = at + bytes;
  }
  void FetchNext() {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    at += 64;
    if (at >= end) Start(list + 1);
  }
};

// Four columns each, some of the listed.
struct QuadRange {
  const int32_t* list;
  const int8_t* x;
  int64_t count;
};

// sums [codes of a vector] += columns at `codes` times their activations. Vectors kFirst .. kFirst
// + kVectors of the interleaved four.
template <typename Vec, int kFirst, int kVectors>
static inline void AddColumns(const uint8_t* codes, int64_t stride, QuadRange quads,
                              ColumnCursor& ahead, int32_t* sums) {
  using Int = typename Vec::Int;
  ColumnCursor cursor = ahead;
  Int sum[kVectors][kNumFields];
#pragma GCC unroll 4
  for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f) sum[q][f] = Vec::Zero();
  for (int64_t i = 0; i < quads.count; ++i, quads.list += 4, quads.x += 4) {
    Int line[4], v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      line[j] = Vec::Load(codes + quads.list[j] * stride);
      if (kFirst == 0 && j * Vec::kBytes % 64 == 0) cursor.FetchNext();
    }
    InterleaveBytes<Vec>(line, v);
    const Int four = Vec::Broadcast(quads.x);
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        Vec::Dot(sum[q][f], Vec::template Field<kNumFields>(v[kFirst + q], f), four);
      }
  }
  ahead = cursor;
#pragma GCC unroll 4
  for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f) {
      Vec::AddTo(sums + ((kFirst + q) * kNumFields + f) * (Vec::kBytes / 4),
                 Vec::template Total<kNumFields>(sum[q][f], f));
    }
}

// Outputs from the sums of one vector of each line, in the order AddColumns leaves them:
// [vector q][field f][lane L][i] is output 16 (4L + q) + 4f + i.
template <typename Vec>
static inline void StoreColumnSums(const int32_t* sums, const OutputTile& out) {
  constexpr int64_t kOutputs = 4 * Vec::kBytes;
  const auto x_sum = Vec::Splat(out.x_sums[0]);
  const float scale = out.weight_scale * out.x_scales[0];
  float partial[kOutputs];
  float* const y = out.num_outputs < kOutputs ? partial : out.y;
#pragma GCC unroll 16
  for (int i = 0; i < 4 * kNumFields; ++i) {  // i = 4q + f
    const auto values = Vec::Scale(Vec::Sub(Vec::Load(sums + i * (kOutputs / 16)), x_sum), scale);
    Vec::StoreLanes(values, reinterpret_cast<uint8_t*>(y + 4 * i), 64 * sizeof(float));
  }
  if (y == partial) __builtin_memcpy(out.y, partial, sizeof(float) * out.num_outputs);
}

constexpr int64_t kChunkOutputs = 16384;  // outputs whose sums stay in scratch
constexpr int64_t kStretchQuads = 32;     // fours of columns between two updates of sums

// Where RunColumns keeps things in scratch.
struct ColumnScratch {
  int32_t* sums;  // [kChunkOutputs]
  int32_t* list;  // [inputs + kListPad]
  int8_t* x;      // [inputs], of listed columns

  explicit ColumnScratch(uint8_t* scratch)
      : sums(reinterpret_cast<int32_t*>(scratch)),
        list(sums + kChunkOutputs),
        x(reinterpret_cast<int8_t*>(list + kMaxInputs + kListPad)) {}
};
static_assert(4 * kChunkOutputs + 4 * (kMaxInputs + kListPad) + kMaxInputs <= kScratchSize);

// Outputs [begin, end) of one row from `count` listed columns. Stretches of columns go by, so that
// memory is read line after line, whole columns at a time, ahead of the products.
template <typename Vec>
static void RunColumnChunk(const TernaryRun& run, int64_t row, const ColumnScratch& s,
                           int64_t count, int64_t begin, int64_t end) {
  constexpr int64_t kOutputs = 4 * Vec::kBytes;
  constexpr int kVectors = Vec::kColumnSums / kNumFields;
  const int64_t num_quads = (count + 3) / 4, size = end - begin;
  for (int64_t i = 0; i < (size + kOutputs - 1) / kOutputs * kOutputs; ++i) s.sums[i] = 0;
  ColumnCursor ahead = {run.codes + begin / 4, run.stride_bytes, (size + 3) / 4};
  for (int64_t q = 0; q < num_quads; q += kStretchQuads) {
    const QuadRange quads = {s.list + 4 * q, s.x + 4 * q, Min(kStretchQuads, num_quads - q)};
    ahead.Start(quads.list + 4 * kStretchQuads);
    for (int64_t o = 0; o < size; o += kOutputs) {
      const uint8_t* codes = run.codes + (begin + o) / 4;
      AddColumns<Vec, 0, kVectors>(codes, run.stride_bytes, quads, ahead, s.sums + o);
      if constexpr (kVectors == 2) {
        AddColumns<Vec, 2, kVectors>(codes, run.stride_bytes, quads, ahead, s.sums + o);
      }
    }
  }
  for (int64_t o = 0; o < size; o += kOutputs) {
    StoreColumnSums<Vec>(s.sums + o, {run.y + row * run.y_stride + begin + o, run.y_stride, 1,
                                      static_cast<int>(Min(kOutputs, size - o)), run.weight_scale,
                                      run.x_scales + row, run.x_sums + row});
  }
}

template <typename Micro, typename Vec>
static void RunColumnsWith(const TernaryRun& run) {
  if (!SparseIsFaster(run, run.num_blocks, LiveInputs)) {
    return RunPanelsWith<Micro, ColumnBlocks<Vec>>(run);
  }
  const ColumnScratch scratch(run.scratch);
  for (int64_t r = 0; r < run.num_rows; ++r) {
    int64_t count = 0;
    for (int64_t b = 0; b < run.num_blocks; ++b) {
      count += Vec::ListBits(LiveInputs(run, r, b), b * kBlockInputs, scratch.list + count);
    }
    PadList(scratch.list, count);
    GatherInputs(run.x + r * run.x_stride, scratch.list, count, scratch.x);
    for (int64_t o = 0; o < run.num_outputs; o += kChunkOutputs) {
      RunColumnChunk<Vec>(run, r, scratch, count, o, Min(o + kChunkOutputs, run.num_outputs));
    }
  }
}

// --- Outputs that are wanted

// x in the order in which the fields of lines want it: [vector of a line][field][granule][4].
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

// The dot products of four listed lines with arranged activations. Field f goes to sum f % kSums.
template <typename Vec, int kSums>
static inline __m128i DotLines(const uint8_t* codes, int64_t stride, const int32_t* list,
                               const int8_t* x) {
  using Int = typename Vec::Int;
  constexpr int64_t kAhead = 8;  // lines
  constexpr int64_t kMaxBytes = Vec::kMaxSums / (kNumFields / kSums) * Vec::kBytes;
  Int total[4] = {Vec::Zero(), Vec::Zero(), Vec::Zero(), Vec::Zero()};
  const uint8_t* line[4];
  const uint8_t* ahead[4];
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    line[l] = codes + list[l] * stride;
    ahead[l] = codes + list[l + kAhead] * stride;
  }
  for (int64_t begin = 0; begin < stride; begin += kMaxBytes) {
    const int64_t end = Min(begin + kMaxBytes, stride);
    Int sum[4][kSums];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sum[l][s] = Vec::Zero();
    for (int64_t at = begin; at < end; at += Vec::kBytes, x += kNumFields * Vec::kBytes) {
      Int v[4];
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead[l] + at), _MM_HINT_T0);
        v[l] = Vec::Load(line[l] + at);
      }
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        const Int four = Vec::Load(x + f * Vec::kBytes);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          Vec::Dot(sum[l][f % kSums], Vec::template Field<kSums>(v[l], f), four);
        }
      }
    }
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) {
        total[l] = Vec::Add(total[l], Vec::template Total<kSums>(sum[l][s], s));
      }
  }
  return Vec::SumEach(total);
}

template <typename Vec, int kSums>
static void RunListedRows(const TernaryRun& run, int64_t row, const int32_t* list, int64_t count,
                          const int8_t* x) {
  const __m128 scale = _mm_set1_ps(run.weight_scale * run.x_scales[row]);
  const __m128i x_sum = _mm_set1_epi32(run.x_sums[row]);
  float* const y = run.y + row * run.y_stride;
  for (int64_t i = 0; i < count; i += 4) {
    const __m128i dot = DotLines<Vec, kSums>(run.codes, run.stride_bytes, list + i, x);
    const __m128 values = _mm_mul_ps(_mm_cvtepi32_ps(_mm_sub_epi32(dot, x_sum)), scale);
    for (int j = 0; j < 4; ++j) y[list[i + j]] = values[j];
  }
}

constexpr int64_t kListedPanels = 4096;  // at a time
constexpr int64_t kShortLine = 128;  // bytes; here adding several sums up costs more than it saves

template <typename Micro, typename Vec>
static void RunRowsWith(const TernaryRun& run) {
  const int64_t num_panels = NumPanels(run);
  if (run.gate == nullptr || !SparseIsFaster(run, num_panels, LiveOutputs)) {
    return RunPanelsWith<Micro, RowBlocks<Vec>>(run);
  }
  int8_t* const x = reinterpret_cast<int8_t*>(run.scratch);
  int32_t* const list = reinterpret_cast<int32_t*>(run.scratch + kMaxInputs);
  static_assert(kMaxInputs + 4 * (kListedPanels * kPanelOutputs + kListPad) <= kScratchSize);
  for (int64_t r = 0; r < run.num_rows; ++r) {
    ArrangeInputs<Vec>(run, r, x);
    for (int64_t first = 0; first < num_panels; first += kListedPanels) {
      int64_t count = 0;
      for (int64_t p = first; p < Min(first + kListedPanels, num_panels); ++p) {
        count += Vec::ListBits(LiveOutputs(run, r, p), p * kPanelOutputs, list + count);
      }
      PadList(list, count);
      if (run.stride_bytes <= kShortLine) {
        RunListedRows<Vec, 1>(run, r, list, count, x);
      } else {
        RunListedRows<Vec, Vec::kMaxLineSums>(run, r, list, count, x);
      }
    }
  }
}

}  // namespace ternion::kernels
