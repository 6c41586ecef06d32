// Ternary products with lines of inputs (kColumns): of those that are not 0 in all rows, four at a
// time are interleaved, so that a vector multiplies four inputs' codes with four activations. Many
// rows turn all lines into panels. For Vec, see ternary_lines.h.
//
// Included by files compiled for one instruction set: no std::, nothing inline from other headers.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/ternary_lines.h"

namespace ternion::kernels {

// A vector of each of four listed lines, as four vectors of their bytes side by side: dword i of
// lane L of vector q is byte 16L + 4q + i of each line.
template <typename Vec>
static inline void Interleave(const uint8_t* codes, int64_t stride, const int32_t* list,
                              typename Vec::Int out[4]) {
  const auto v0 = Vec::Load(codes + list[0] * stride), v1 = Vec::Load(codes + list[1] * stride);
  const auto v2 = Vec::Load(codes + list[2] * stride), v3 = Vec::Load(codes + list[3] * stride);
  const auto low01 = Vec::UnpackLo8(v0, v1), low23 = Vec::UnpackLo8(v2, v3);
  const auto high01 = Vec::UnpackHi8(v0, v1), high23 = Vec::UnpackHi8(v2, v3);
  out[0] = Vec::UnpackLo16(low01, low23);
  out[1] = Vec::UnpackHi16(low01, low23);
  out[2] = Vec::UnpackLo16(high01, high23);
  out[3] = Vec::UnpackHi16(high01, high23);
}

template <typename Vec, int kShift>
static inline void SwapBits(typename Vec::Int& a, typename Vec::Int& b, char mask) {
  const auto differ = Vec::And(Vec::Xor(Vec::template Srli<kShift>(a), b), Vec::Set1(mask));
  a = Vec::Xor(a, Vec::template Slli<kShift>(differ));
  b = Vec::Xor(b, differ);
}

// Field i of v[f] becomes field f of v[i].
template <typename Vec>
static inline void SwapFields(typename Vec::Int v[kNumFields]) {
  SwapBits<Vec, 4>(v[0], v[2], 0x0f);
  SwapBits<Vec, 4>(v[1], v[3], 0x0f);
  SwapBits<Vec, 2>(v[0], v[1], 0x33);
  SwapBits<Vec, 2>(v[2], v[3], 0x33);
}

// For TilePanels: blocks of any panel, all of its lines. 16 panels share a line, and are made
// together when the first of them is asked for.
template <typename Vec>
struct ColumnBlocks {
  static const uint8_t* Get(const TernaryRun& run, int64_t panel, int64_t block_begin,
                            int64_t num_blocks, uint8_t* scratch) {
    // One more block, so that panels do not fall into the same cache sets.
    const int64_t panel_size = (num_blocks + 1) * kBlockSize;
    for (int64_t b = 0; panel % kLinePanels == 0 && b < num_blocks; ++b) {
      const uint8_t* lines =
          run.codes + (block_begin + b) * kBlockInputs * run.stride_bytes + 4 * panel;
      for (int64_t at = 0; at < 4 * Min(kLinePanels, NumPanels(run) - panel); at += Vec::kBytes) {
        Transpose(lines + at, run.stride_bytes, scratch + at / 4 * panel_size + b * kBlockSize,
                  panel_size);
      }
    }
    return scratch + panel % kLinePanels * panel_size;
  }

 private:
  // 16 lines to a block of as many panels as share a vector.
  static void Transpose(const uint8_t* lines, int64_t stride, uint8_t* out, int64_t panel_size) {
    const int32_t list[4] = {0, 1, 2, 3};
    typename Vec::Int v[kNumFields][4];
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f, lines += 4 * stride) {
      Interleave<Vec>(lines, stride, list, v[f]);
      for (int i = 0; i < 4; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(lines + i * stride + 64), _MM_HINT_T1);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q, out += panel_size) {
      typename Vec::Int fields[kNumFields] = {v[0][q], v[1][q], v[2][q], v[3][q]};
      SwapFields<Vec>(fields);
      Vec::StoreLanes(fields, out, 4 * panel_size);
    }
  }
};

// Columns whose interleaved codes stay in L1, and outputs whose sums, with the columns' codes, stay
// in L2.
constexpr int64_t kStretchInputs = 256;
constexpr int64_t kStretchQuads = kStretchInputs / 4;
constexpr int64_t kMaxChunkOutputs = 4096;

// Listed columns and their activations; whole fours.
struct Stretch {
  int64_t count;
  int32_t list[kStretchInputs];
  int8_t x[kListedRows][kStretchInputs];
};

// Where RunColumnChunk keeps things in scratch.
struct ColumnScratch {
  static constexpr int64_t kSums = kListedRows * kMaxChunkOutputs / 2;

  alignas(64) int32_t sums[kSums];                          // [rows, outputs of a chunk]
  alignas(64) uint8_t codes[4 * (kStretchQuads + 1) * 64];  // interleaved
  Stretch stretches[2];
};
static_assert(sizeof(ColumnScratch) <= kScratchSize);

// Bit i: x[k + i] is not 0 in some row.
static inline int LiveInputs(const TernaryRun& run, int64_t block) {
  const int8_t* x = run.x + block * kBlockInputs;
  __m128i any = _mm_setzero_si128();
  int live = 0;
  for (int64_t r = 0; r < run.num_rows && live != kAllLive; ++r, x += run.x_stride) {
    any = _mm_or_si128(any, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    live = ~_mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) & kAllLive;
  }
  return live;
}

// Lists live columns from `block` on, up to `max`; returns the first block not looked at.
template <typename Vec>
static int64_t FillStretch(const TernaryRun& run, int64_t block, int64_t max, Stretch& s) {
  s.count = 0;
  for (; block < run.num_blocks && s.count + kBlockInputs <= max; ++block) {
    const int live = LiveInputs(run, block);
    if (live == 0) continue;
    const int8_t* x = run.x + block * kBlockInputs;
    for (int64_t r = 0; r < run.num_rows; ++r, x += run.x_stride) {
      if (live == kAllLive) {
        __builtin_memcpy(s.x[r] + s.count, x, kBlockInputs);
      } else {
        Vec::Compress(live, x, s.x[r] + s.count);
      }
    }
    s.count += Vec::ListBits(live, block * kBlockInputs, s.list + s.count);
  }
  for (; s.count % 4 != 0; ++s.count) {
    s.list[s.count] = s.list[s.count - 1];
    for (int64_t r = 0; r < run.num_rows; ++r) s.x[r][s.count] = 0;
  }
  return block;
}

// Some outputs times a stretch: those of a vector of each line (wide), or kNarrowOutputs.
struct ColumnTile {
  const uint8_t* codes;  // of line 0
  int64_t stride;
  const Stretch* stretch;
  uint8_t* interleaved;  // scratch: [vectors, kStretchQuads + 1] vectors
  int32_t* sums;         // [rows, sums_stride]: [vector, field, lanes]
  int64_t sums_stride;
  bool first;  // there are no sums yet
  bool wide;
};

// Vectors that a tile's outputs take: kBytes outputs each.
template <typename Vec>
static constexpr int64_t TileVectors(bool wide) {
  return wide ? 4 : kNarrowOutputs / Vec::kBytes;
}

// One more than needed: vectors of a tile must not fall into the same cache sets.
template <typename Vec>
constexpr int64_t kTileVectorBytes = (kStretchQuads + 1) * Vec::kBytes;

// Interleaves 16 bytes of each line, to where AddColumns will read them: lanes are in order, dword
// i of lane q is byte 4q + i.
template <typename Vec>
static void InterleaveNarrow(const ColumnTile& t) {
  for (int64_t i = 0; i < t.stretch->count; i += 4) {
    const int32_t* list = t.stretch->list + i;
    __m128i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(t.codes + list[j] * t.stride));
    }
    const __m128i low01 = _mm_unpacklo_epi8(v[0], v[1]), low23 = _mm_unpacklo_epi8(v[2], v[3]);
    const __m128i high01 = _mm_unpackhi_epi8(v[0], v[1]), high23 = _mm_unpackhi_epi8(v[2], v[3]);
    const __m128i lanes[4] = {_mm_unpacklo_epi16(low01, low23), _mm_unpackhi_epi16(low01, low23),
                              _mm_unpacklo_epi16(high01, high23),
                              _mm_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      constexpr int kLanes = Vec::kBytes / 16;
      _mm_store_si128(
          reinterpret_cast<__m128i*>(t.interleaved + q / kLanes * kTileVectorBytes<Vec> +
                                     i / 4 * Vec::kBytes + q % kLanes * 16),
          lanes[q]);
    }
  }
}

// Which sums AddColumns has in registers, and where its codes come from: lines, interleaved here
// and left in scratch for the calls after it, or from there.
struct AddShape {
  int rows;
  int first_field, fields;
  int vectors;  // of a tile
  bool from_lines;
};

// sums += the tile's vectors from v on times rows from r on.
template <typename Vec, AddShape kShape>
__attribute__((noinline)) static void AddColumns(const ColumnTile& t, int64_t v, int64_t r,
                                                 Ahead* next) {
  using Int = typename Vec::Int;
  constexpr int kRows = kShape.rows, kFields = kShape.fields, kVectors = kShape.vectors;
  constexpr bool kKeep = kShape.from_lines && (kVectors < 4 || kFields < kNumFields);
  Ahead ahead = *next;
  Int sum[kVectors][kRows][kFields];
#pragma GCC unroll 4
  for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int f = 0; f < kFields; ++f) sum[q][i][f] = Vec::Zero();
  const uint8_t* const lines = t.codes;
  const int64_t stride = t.stride;
  const int32_t* list = t.stretch->list;
  const int32_t* const end = list + t.stretch->count;
  const int8_t* x = t.stretch->x[r];
  uint8_t* codes = t.interleaved + v * kTileVectorBytes<Vec>;
  for (; list < end; list += 4, codes += Vec::kBytes, x += 4) {
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) ahead.Fetch();
    Int four_lines[4];
    if constexpr (kShape.from_lines) {
      Interleave<Vec>(lines, stride, list, four_lines);
    } else {
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q) {
        four_lines[q] = Vec::Load(codes + q * kTileVectorBytes<Vec>);
      }
    }
    if constexpr (kKeep) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) Vec::Store(codes + q * kTileVectorBytes<Vec>, four_lines[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) {
      Int fields[kFields];
#pragma GCC unroll 4
      for (int f = 0; f < kFields; ++f) {
        fields[f] = Vec::template Field<kNumFields>(four_lines[q], kShape.first_field + f);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Int four = Vec::Broadcast(x + i * kStretchInputs);
#pragma GCC unroll 4
        for (int f = 0; f < kFields; ++f) Vec::Dot(sum[q][i][f], fields[f], four);
      }
    }
  }
  *next = ahead;
  int32_t* sums = t.sums + r * t.sums_stride + v * Vec::kBytes;
  const int64_t sums_stride = t.sums_stride;
  const bool first = t.first;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i, sums += sums_stride)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q)
#pragma GCC unroll 4
      for (int f = 0; f < kFields; ++f) {
        const int field = kShape.first_field + f;
        const Int total = Vec::template Total<kNumFields>(sum[q][i][f], field);
        int32_t* const to = sums + (q * kNumFields + field) * (Vec::kBytes / 4);
        Vec::Store(to, first ? total : Vec::Add(total, Vec::Load(to)));
      }
}

// The same for up to kRows rows, with as many fields at once as there are registers for sums.
template <typename Vec, bool kFromLines, int kVectors, int kRows>
static inline void AddColumnRows(const ColumnTile& t, int64_t v, int64_t row, int64_t num_rows,
                                 Ahead* ahead) {
  if (num_rows < kRows) {
    if constexpr (kRows > 1) {
      AddColumnRows<Vec, kFromLines, kVectors, kRows - 1>(t, v, row, num_rows, ahead);
    }
  } else if constexpr (kRows * kNumFields <= Vec::kRegisterSums) {
    AddColumns<Vec, AddShape{kRows, 0, 4, kVectors, kFromLines}>(t, v, row, ahead);
  } else {
    AddColumns<Vec, AddShape{kRows, 0, 2, kVectors, kFromLines}>(t, v, row, ahead);
    AddColumns<Vec, AddShape{kRows, 2, 2, kVectors, false}>(t, v, row, ahead);
  }
}

// The tile times all rows. The first products of a wide tile interleave its codes on the way, so
// that shuffles and reading the cache hide behind them.
template <typename Vec>
static void AddTile(const ColumnTile& t, int64_t num_rows, Ahead& ahead) {
  constexpr int kMaxRows = Vec::kRegisterSums / 2;
  constexpr int kOneRowVectors = Vec::kRegisterSums >= 16 ? 4 : 2;
  const int64_t pieces = (num_rows + kMaxRows - 1) / kMaxRows;
  const int64_t passes = num_rows / pieces * kNumFields > Vec::kRegisterSums ? 2 : 1;
  ahead.step = (64 + pieces * passes - 1) / (pieces * passes);
  int64_t v = 0;
  if (t.wide && num_rows == 1) {
    AddColumnRows<Vec, true, kOneRowVectors, 1>(t, 0, 0, 1, &ahead);
    v = kOneRowVectors;
  } else if (!t.wide) {
    InterleaveNarrow<Vec>(t);
  }
  for (; v < TileVectors<Vec>(t.wide); ++v) {
    ForPieces(num_rows, kMaxRows, [&](int64_t begin, int64_t end) {
      if (t.wide && v == 0 && begin == 0) {
        AddColumnRows<Vec, true, 1, kMaxRows>(t, v, begin, end - begin, &ahead);
      } else {
        AddColumnRows<Vec, false, 1, kMaxRows>(t, v, begin, end - begin, &ahead);
      }
    });
  }
}

// One row's outputs from its sums; `out.num_outputs` of a tile.
template <typename Vec>
static inline void StoreTile(const int32_t* sums, bool wide, const OutputTile& out) {
  constexpr int64_t kLanes = Vec::kBytes / 16;
  const auto x_sum = Vec::Splat(out.x_sums[0]);
  const float scale = out.weight_scale * out.x_scales[0];
  float partial[kNarrowOutputs];
  float* const y = !wide && out.num_outputs < kNarrowOutputs ? partial : out.y;
  for (int64_t v = 0; v < TileVectors<Vec>(wide); ++v) {
    typename Vec::Int values[kNumFields];
#pragma GCC unroll 4
    for (int f = 0; f < kNumFields; ++f, sums += 4 * kLanes) {
      values[f] = Vec::Scale(Vec::Sub(Vec::Load(sums), x_sum), scale);
    }
    Vec::StoreLanes(values, y + (wide ? 16 * v : 16 * kLanes * v),
                    (wide ? 64 : 16) * static_cast<int64_t>(sizeof(float)));
  }
  if (y == partial) __builtin_memcpy(out.y, partial, sizeof(float) * out.num_outputs);
}

// Calls body(first output, wide, outputs) for the tiles of `count` outputs.
template <typename Vec, typename Body>
static inline void ForTiles(int64_t count, const Body& body) {
  constexpr int64_t kWide = 4 * Vec::kBytes;
  int64_t o = 0;
  for (; o + kWide <= count; o += kWide) body(o, true, kWide);
  for (; o < count; o += kNarrowOutputs) body(o, false, Min(kNarrowOutputs, count - o));
}

// All rows of the run, outputs [begin, end). Stretches of columns go by, so that memory is read
// line after line, ahead of the products.
template <typename Vec>
static void RunColumnChunk(const TernaryRun& run, ColumnScratch& s, int64_t begin, int64_t end) {
  const int64_t size = end - begin;
  const int64_t sums_stride = (size + kNarrowOutputs - 1) / kNarrowOutputs * kNarrowOutputs;
  const uint8_t* const codes = run.codes + begin / 4;
  Ahead ahead = {nullptr, nullptr, codes, (size + 3) / 4, run.stride_bytes};
  Stretch* stretch = &s.stretches[0];
  Stretch* next = &s.stretches[1];
  // Rows that take all fields at once gain little from long stretches; the first is not fetched
  // ahead.
  const bool few = run.num_rows * kNumFields <= Vec::kRegisterSums;
  const int64_t max = few ? kStretchInputs / 2 : kStretchInputs;
  int64_t block = FillStretch<Vec>(run, 0, max, *stretch);
  for (bool first = true; first || stretch->count > 0; first = false) {
    block = FillStretch<Vec>(run, block, max, *next);
    ahead.Start(next->list, next->count);
    ForTiles<Vec>(size, [&](int64_t o, bool wide, int64_t) {
      const ColumnTile tile = {codes + o / 4, run.stride_bytes, stretch, s.codes,
                               s.sums + o,    sums_stride,      first,   wide};
      AddTile<Vec>(tile, run.num_rows, ahead);
    });
    Stretch* const done = stretch;
    stretch = next;
    next = done;
  }
  for (int64_t r = 0; r < run.num_rows; ++r) {
    ForTiles<Vec>(size, [&](int64_t o, bool wide, int64_t outputs) {
      StoreTile<Vec>(
          s.sums + r * sums_stride + o, wide,
          {run.y + r * run.y_stride + begin + o, run.y_stride, 1, static_cast<int>(outputs),
           run.weight_scale, run.x_scales + r, run.x_sums + r});
    });
  }
}

template <typename Micro, typename Vec>
static void RunColumnsWith(const TernaryRun& run) {
  static_assert(Vec::kMaxColumnRows >= kMaxNarrowRows && Vec::kMaxColumnRows <= kListedRows);
  static_assert(kStretchQuads <= Vec::kMaxSums);
  if (run.num_rows > Vec::kMaxColumnRows) return TilePanels<Micro, ColumnBlocks<Vec>>(run);
  ColumnScratch& s = *reinterpret_cast<ColumnScratch*>(run.scratch);
  const int64_t rows = run.num_rows < 1 ? 1 : run.num_rows;
  const int64_t chunk =
      Min(kMaxChunkOutputs, ColumnScratch::kSums / rows / kLineOutputs * kLineOutputs);
  for (int64_t o = 0; o < run.num_outputs; o += chunk) {
    RunColumnChunk<Vec>(run, s, o, Min(o + chunk, run.num_outputs));
  }
}

}  // namespace ternion::kernels
