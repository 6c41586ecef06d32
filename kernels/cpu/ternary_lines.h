// Ternary products with matrices whose codes lie in lines, an output's (kRows) or an input's
// (kColumns): few rows of activations skip the lines that add nothing; many turn lines into panels
// first, 16 at a time. Vec is a vector of 2 or 4 lanes of 128 bits and how the variant multiplies
// with it, a type of internal linkage of one ternary_<variant>.cc:
//
//   Field<k>(v, f)       2-bit field f of every byte, worth 4^(f % k) when fields may stay in place
//   Dot(sum, codes, x)   sum += four codes times four activations, in every dword
//   kMaxSums             so many Dots fit into a sum
//   Total<k>(sum, f)     int32 lanes of a sum over fields f, worth 1 again
//   kColumnRegisters     sums that AddColumns may hold in registers
//   kMaxLineSums         sums per line in long lines
//   kMaxSparseRows       with more rows than this, panels are faster
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
    return kLinePanels * num_blocks * kBlockSize;
  }

  static const uint8_t* Get(const TernaryRun& run, int64_t panel, int64_t block_begin,
                            int64_t num_blocks, uint8_t* scratch) {
    const int64_t panel_size = num_blocks * kBlockSize;
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

// --- Inputs that are not 0

// Pads lists of lines to whole steps of the loops that walk them, and those that prefetch.
constexpr int64_t kListPad = 512;

// Inputs that are not 0 in all rows, ascending, then kListPad times the last.
template <typename Vec>
static inline int64_t ListInputs(const TernaryRun& run, int32_t* list) {
  int64_t count = 0;
  for (int64_t k = 0; k < run.num_blocks * kBlockInputs; k += kBlockInputs) {
    __m128i any = _mm_setzero_si128();
    for (int64_t r = 0; r < run.num_rows; ++r) {
      const int8_t* x = run.x + r * run.x_stride + k;
      any = _mm_or_si128(any, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    }
    const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128()));
    count += Vec::ListBits(~zeros & 0xffff, static_cast<int32_t>(k), list + count);
  }
  for (int64_t i = 0; i < kListPad; ++i) list[count + i] = count > 0 ? list[count - 1] : 0;
  return count;
}

// out [ceil(count / 4), num_rows, 4]: the listed activations; 0 past them.
static inline void GatherInputs(const TernaryRun& run, const int32_t* list, int64_t count,
                                int8_t* out) {
  for (int64_t i = 0; i < count; i += 4) {
    for (int64_t r = 0; r < run.num_rows; ++r, out += 4) {
      const int8_t* x = run.x + r * run.x_stride;
      for (int64_t j = 0; j < 4; ++j) out[j] = i + j < count ? x[list[i + j]] : int8_t{0};
    }
  }
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

// sums [kRows][codes of a vector] += `num_quads` times four columns, at `codes`, times activations
// x [num_quads, x_rows, 4]. Vectors first .. first + kVectors of the interleaved four.
template <typename Vec, int kRows, int kFirst, int kVectors>
__attribute__((noinline)) static void AddColumns(const uint8_t* codes, int64_t stride,
                                                 const int32_t* list, int64_t num_quads,
                                                 ColumnCursor& ahead, const int8_t* x,
                                                 int64_t x_rows, int32_t* sums,
                                                 int64_t sums_stride) {
  using Int = typename Vec::Int;
  ColumnCursor cursor = ahead;
  Int sum[kRows][kVectors][kNumFields];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) sum[r][q][f] = Vec::Zero();
  for (int64_t i = 0; i < num_quads; ++i, list += 4, x += 4 * x_rows) {
    Int line[4], v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      line[j] = Vec::Load(codes + list[j] * stride);
      if (kFirst == 0 && j * Vec::kBytes % 64 == 0) cursor.FetchNext();
    }
    InterleaveBytes<Vec>(line, v);
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        const Int field = Vec::template Field<kNumFields>(v[kFirst + q], f);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          Vec::Dot(sum[r][q][f], field, Vec::Broadcast(x + 4 * r));
        }
      }
  }
  ahead = cursor;
  constexpr int64_t kLanes = Vec::kBytes / 4;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        Vec::AddTo(sums + r * sums_stride + ((kFirst + q) * kNumFields + f) * kLanes,
                   Vec::template Total<kNumFields>(sum[r][q][f], f));
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

constexpr int64_t kMaxSumRows = 4;        // rows of activations at a time
constexpr int64_t kChunkOutputs = 16384;  // outputs whose sums stay in scratch
constexpr int64_t kStretchQuads = 32;     // fours of columns between two updates of sums

// Where RunColumns keeps things in scratch.
struct ColumnScratch {
  int32_t* sums;  // [rows, kChunkOutputs]
  int32_t* list;  // [inputs + kListPad]
  int8_t* x;      // [inputs / 4, rows, 4]

  explicit ColumnScratch(uint8_t* scratch)
      : sums(reinterpret_cast<int32_t*>(scratch)),
        list(sums + kMaxSumRows * kChunkOutputs),
        x(reinterpret_cast<int8_t*>(list + kMaxInputs + kListPad)) {}
};
static_assert(4 * kMaxSumRows * kChunkOutputs + 4 * (kMaxInputs + kListPad) +
                  kMaxSumRows * kMaxInputs <=
              kScratchSize);

// One stretch of columns, one vector of their lines, all rows.
template <typename Vec, int kRows, int kFirst = 0>
static inline void AddStretch(const TernaryRun& run, const ColumnScratch& s, int64_t output,
                              int64_t chunk, int64_t quad, int64_t num_quads, int64_t row,
                              ColumnCursor& ahead) {
  constexpr int kFit = Vec::kColumnRegisters / kNumFields / kRows;
  constexpr int kVectors = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  if constexpr (kFirst < 4) {
    AddColumns<Vec, kRows, kFirst, kVectors>(
        run.codes + output / 4, run.stride_bytes, s.list + 4 * quad, num_quads, ahead,
        s.x + 4 * (quad * run.num_rows + row), run.num_rows,
        s.sums + row * kChunkOutputs + output - chunk, kChunkOutputs);
    AddStretch<Vec, kRows, kFirst + kVectors>(run, s, output, chunk, quad, num_quads, row, ahead);
  }
}

// Outputs [chunk, chunk_end).
template <typename Vec>
static void RunColumnChunk(const TernaryRun& run, const ColumnScratch& s, int64_t count,
                           int64_t chunk, int64_t chunk_end) {
  constexpr int64_t kOutputs = 4 * Vec::kBytes;
  const int64_t num_quads = (count + 3) / 4;
  ColumnCursor ahead = {run.codes + chunk / 4, run.stride_bytes, (chunk_end - chunk + 3) / 4};
  for (int64_t r = 0; r < run.num_rows; ++r) {
    int32_t* sums = s.sums + r * kChunkOutputs;
    for (int64_t i = 0; i < (chunk_end - chunk + kOutputs - 1) / kOutputs * kOutputs; ++i)
      sums[i] = 0;
  }
  for (int64_t quad = 0; quad < num_quads; quad += kStretchQuads) {
    const int64_t quads = Min(kStretchQuads, num_quads - quad);
    ahead.Start(s.list + 4 * (quad + kStretchQuads));
    for (int64_t output = chunk; output < chunk_end; output += kOutputs) {
      for (int64_t row = 0; row < run.num_rows;) {
        if (Vec::kColumnRegisters >= 8 && row + 2 <= run.num_rows) {
          AddStretch<Vec, 2>(run, s, output, chunk, quad, quads, row, ahead);
          row += 2;
        } else {
          AddStretch<Vec, 1>(run, s, output, chunk, quad, quads, row, ahead);
          row += 1;
        }
      }
    }
  }
  for (int64_t r = 0; r < run.num_rows; ++r) {
    for (int64_t output = chunk; output < chunk_end; output += kOutputs) {
      StoreColumnSums<Vec>(s.sums + r * kChunkOutputs + output - chunk,
                           {run.y + r * run.y_stride + output, run.y_stride, 1,
                            static_cast<int>(Min(kOutputs, run.num_outputs - output)),
                            run.weight_scale, run.x_scales + r, run.x_sums + r});
    }
  }
}

template <typename Micro, typename Vec>
static void RunColumnsWith(const TernaryRun& run) {
  if (run.num_rows > Vec::kMaxSparseRows) return RunPanelsWith<Micro, ColumnBlocks<Vec>>(run);
  const ColumnScratch scratch(run.scratch);
  const int64_t count = ListInputs<Vec>(run, scratch.list);
  GatherInputs(run, scratch.list, count, scratch.x);
  for (int64_t chunk = 0; chunk < run.num_outputs; chunk += kChunkOutputs) {
    RunColumnChunk<Vec>(run, scratch, count, chunk, Min(chunk + kChunkOutputs, run.num_outputs));
  }
}

// --- Outputs that are wanted

// Outputs [begin, end) whose gate is above 0 (or NaN) in some row, ascending, then kListPad times
// the last.
template <typename Vec>
static inline int64_t ListOutputs(const TernaryRun& run, int64_t begin, int64_t end,
                                  int32_t* list) {
  int64_t count = 0;
  int64_t o = begin;
  for (; o + 16 <= end; o += 16) {
    int live = 0;
    for (int64_t r = 0; r < run.num_rows; ++r) {
      const float* gate = run.gate + r * run.y_stride + o;
      for (int i = 0; i < 16; i += 4) {
        const __m128 above = _mm_cmpnle_ps(_mm_loadu_ps(gate + i), _mm_setzero_ps());
        live |= _mm_movemask_ps(above) << i;
      }
    }
    count += Vec::ListBits(live, static_cast<int32_t>(o), list + count);
  }
  for (; o < end; ++o) {
    bool live = false;
    for (int64_t r = 0; r < run.num_rows; ++r) live |= !(run.gate[r * run.y_stride + o] <= 0);
    if (live) list[count++] = static_cast<int32_t>(o);
  }
  for (int64_t i = 0; i < kListPad; ++i) list[count + i] = count > 0 ? list[count - 1] : 0;
  return count;
}

// x in the order in which the fields of lines want it: [vector of a line][field][granule][4].
template <typename Vec>
static inline void ArrangeInputs(const TernaryRun& run, int64_t row, int8_t* out) {
  constexpr int64_t kGranules = Vec::kBytes / 4;
  const int8_t* x = run.x + row * run.x_stride;
  for (int64_t g = 0; g < run.stride_bytes / 4; ++g) {
    int8_t* to = out + g / kGranules * (kNumFields * Vec::kBytes) + g % kGranules * 4;
    for (int f = 0; f < kNumFields; ++f, to += Vec::kBytes) {
      if (g < run.num_blocks) {
        __builtin_memcpy(to, x + g * kBlockInputs + 4 * f, 4);
      } else {
        __builtin_memset(to, 0, 4);
      }
    }
  }
}

// The dot products of four lines with one row of arranged activations. Field f goes to sum f %
// kSums.
template <typename Vec, int kSums>
static inline __m128i DotLines(const uint8_t* codes, int64_t stride, const int32_t* list,
                               const int8_t* x, bool prefetch) {
  using Int = typename Vec::Int;
  constexpr int64_t kMaxBytes = Vec::kMaxSums / (kNumFields / kSums) * Vec::kBytes;
  Int total[4] = {Vec::Zero(), Vec::Zero(), Vec::Zero(), Vec::Zero()};
  const uint8_t* const line[4] = {codes + list[0] * stride, codes + list[1] * stride,
                                  codes + list[2] * stride, codes + list[3] * stride};
  for (int64_t begin = 0; begin < stride; begin += kMaxBytes) {
    const int64_t end = Min(begin + kMaxBytes, stride);
    Int sum[4][kSums];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sum[l][s] = Vec::Zero();
    for (int64_t at = begin; at < end; at += Vec::kBytes, x += kNumFields * Vec::kBytes) {
      if (prefetch) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          const uint8_t* ahead = codes + list[8 + l] * stride + at;
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        }
      }
      const Int v[4] = {Vec::Load(line[0] + at), Vec::Load(line[1] + at), Vec::Load(line[2] + at),
                        Vec::Load(line[3] + at)};
#pragma GCC unroll 4
      for (int f = 0; f < kNumFields; ++f) {
        const Int four = Vec::Load(x + f * Vec::kBytes);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l)
          Vec::Dot(sum[l][f % kSums], Vec::template Field<kSums>(v[l], f), four);
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

constexpr int64_t kListedOutputs = 65536;  // at a time
constexpr int64_t kShortLine = 128;  // bytes; here adding several sums up costs more than it saves

template <typename Vec, int kSums>
static void RunListedRows(const TernaryRun& run, const int32_t* list, int64_t count,
                          const int8_t* x) {
  for (int64_t i = 0; i < count; i += 4) {
    for (int64_t r = 0; r < run.num_rows; ++r) {
      const __m128i dot = DotLines<Vec, kSums>(run.codes, run.stride_bytes, list + i,
                                               x + r * run.stride_bytes * kNumFields, r == 0);
      const __m128 scale = _mm_set1_ps(run.weight_scale * run.x_scales[r]);
      const __m128i x_sum = _mm_set1_epi32(run.x_sums[r]);
      const __m128 y = _mm_mul_ps(_mm_cvtepi32_ps(_mm_sub_epi32(dot, x_sum)), scale);
      for (int j = 0; j < 4; ++j) run.y[r * run.y_stride + list[i + j]] = y[j];
    }
  }
}

template <typename Micro, typename Vec>
static void RunRowsWith(const TernaryRun& run) {
  if (run.gate == nullptr || run.num_rows > Vec::kMaxSparseRows) {
    return RunPanelsWith<Micro, RowBlocks<Vec>>(run);
  }
  int8_t* const x = reinterpret_cast<int8_t*>(run.scratch);
  int32_t* const list = reinterpret_cast<int32_t*>(run.scratch + kMaxSumRows * kMaxInputs);
  static_assert(kMaxSumRows * kMaxInputs + 4 * (kListedOutputs + kListPad) <= kScratchSize);
  for (int64_t r = 0; r < run.num_rows; ++r) {
    ArrangeInputs<Vec>(run, r, x + r * run.stride_bytes * kNumFields);
  }
  for (int64_t o = 0; o < run.num_outputs; o += kListedOutputs) {
    const int64_t end = Min(o + kListedOutputs, run.num_outputs);
    const int64_t count = ListOutputs<Vec>(run, o, end, list);
    if (run.stride_bytes <= kShortLine) {
      RunListedRows<Vec, 1>(run, list, count, x);
    } else {
      RunListedRows<Vec, Vec::kMaxLineSums>(run, list, count, x);
    }
  }
}

}  // namespace ternion::kernels
