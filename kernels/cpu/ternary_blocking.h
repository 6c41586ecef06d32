// How one thread walks its panels: which weights and activations are in which cache when. The
// arithmetic is the template argument Micro, a type of internal linkage of one
// ternary_<variant>.cc:
//
//   Stream(StreamArgs)   one panel, straight from its 2-bit codes, times 1 .. kStreamRows rows
//   Unpack(...)          2-bit codes of some blocks -> bytes, ordered as Tile reads them
//   Tile(TileArgs)       one unpacked panel times 1 .. kTileRows rows, over a stretch of columns
//   kMaxStreamedRows     with more rows than this, unpacking into cache first pays
//
// Included by files compiled for one instruction set: no std::, nothing inline from other headers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/ternary_panels.h"

namespace ternion::kernels {

constexpr int kNumFields = 4;  // 2-bit fields in a byte; a panel's field f holds columns 4f .. 4f+3

// Where the dot products of one kernel call go:
// y[r][o] = float(dot - x_sums[r]) * (weight_scale * x_scales[r]).
struct OutputTile {
  float* y;  // [num_rows, y_stride], columns 0 .. num_outputs
  int64_t y_stride;
  int num_rows;
  int num_outputs;
  float weight_scale;
  const float* x_scales;  // [num_rows]
  const int32_t* x_sums;  // [num_rows]
};

// For members of types that all variants share: no copy of one variant must serve another.
#define TERNION_ALWAYS_INLINE __attribute__((always_inline)) inline

// What will be read from memory next: kernels fetch some of it with each block they multiply,
// so that memory and arithmetic overlap.
struct Ahead {
  const uint8_t* at;               // the next byte
  const uint8_t* end;              // of this line
  const uint8_t* lines = nullptr;  // some bytes of
  int64_t line_bytes = 0;          //   each line, the lines being
  int64_t stride = 0;              //   so far apart
  const int32_t* list = nullptr;   // this line's number
  const int32_t* list_end = nullptr;
  int64_t step = 64;  // bytes at a time

  // From the listed lines, one after the other: memory is fastest in its own order.
  TERNION_ALWAYS_INLINE void Start(const int32_t* begin, int64_t count) {
    list = begin;
    list_end = begin + count;
    at = end = lines;
    if (count > 0) StartLine();
  }
  TERNION_ALWAYS_INLINE void Fetch() {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    at += step;
    if (at < end) return;
    if (list_end - list > 1) {
      ++list;
      StartLine();
    } else {
      at = end - step;  // all is fetched
    }
  }

 private:
  TERNION_ALWAYS_INLINE void StartLine() {
    at = lines + *list * stride;
    end = at + line_bytes;
  }
};

struct StreamArgs {
  const uint8_t* codes;  // one panel
  const int8_t* x;       // [num_blocks, num_rows, 16]
  int64_t num_blocks;
  Ahead* ahead;
  OutputTile out;
};

// Columns are done in stretches. Between them, y holds the int32 sums so far.
struct TileArgs {
  const uint8_t* unpacked;  // one panel, a byte per code
  const int8_t* x;          // [num_blocks, num_rows, 16]
  int64_t num_blocks;       // of this stretch
  bool first;               // start from 0, not from the sums in y
  bool last;                // write floats, not sums
  OutputTile out;
};

constexpr int64_t kPanelOutputs = 16;
constexpr int64_t kBlockInputs = 16;
constexpr int64_t kBlockSize = 64;  // bytes, packed
constexpr int64_t kUnpackedBlockSize = 4 * kBlockSize;
constexpr int64_t kLinePanels = kLineOutputs / kPanelOutputs;
constexpr int64_t kStreamAhead = 64 * 96;           // bytes from panels' codes to those to fetch
constexpr int64_t kScratchSize = int64_t{1} << 20;  // base::kScratchBytesPerThread

// A stretch is 2,048 columns: sums are loaded and stored rarely, and kRowBlock rows of it (528 KB)
// stay in L2 while all panels pass by.
constexpr int64_t kStretchBlocks = 128;
constexpr int64_t kRowBlock = 264;
constexpr int64_t kUnpackedPanelSize = kStretchBlocks * kUnpackedBlockSize;
constexpr int64_t kTileRowsSize = kRowBlock * kStretchBlocks * kBlockInputs;
constexpr int64_t kConvertedSize = kLinePanels * (kStretchBlocks + 1) * kBlockSize;
static_assert(kUnpackedPanelSize + kTileRowsSize + kConvertedSize <= kScratchSize);

static inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(begin, end) for pieces of at most `max` elements, as even as they can be.
template <typename Body>
static inline void ForPieces(int64_t count, int64_t max, const Body& body) {
  const int64_t pieces = (count + max - 1) / max;
  for (int64_t i = 0; i < pieces; ++i) body(count * i / pieces, count * (i + 1) / pieces);
}

// One panel, rows [row_begin, row_end).
static inline OutputTile Outputs(const TernaryRun& run, int64_t panel, int64_t row_begin,
                                 int64_t row_end) {
  const int64_t output = panel * kPanelOutputs;
  return {run.y + row_begin * run.y_stride + output,
          run.y_stride,
          static_cast<int>(row_end - row_begin),
          static_cast<int>(Min(kPanelOutputs, run.num_outputs - output)),
          run.weight_scale,
          run.x_scales + row_begin,
          run.x_sums + row_begin};
}

static inline int64_t NumPanels(const TernaryRun& run) {
  return (run.num_outputs + kPanelOutputs - 1) / kPanelOutputs;
}

// Rows as the kernels read them: one stream instead of one per row, addressed by constant offsets.
// Pieces of rows follow each other.
static inline void InterleaveRows(const int8_t* x, int64_t x_stride, int64_t num_rows,
                                  int64_t max_rows, int64_t num_blocks, int8_t* out) {
  ForPieces(num_rows, max_rows, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      for (int64_t r = begin; r < end; ++r, out += kBlockInputs) {
        __builtin_memcpy(out, x + r * x_stride + b * kBlockInputs, kBlockInputs);
      }
    }
  });
}

// How TilePanels gets at blocks of a panel (packed): here they lie in memory.
// Panels are asked for in ascending order, all with the same blocks, before the next blocks are.
struct PanelBlocks {
  TERNION_ALWAYS_INLINE static const uint8_t* Get(const TernaryRun& run, int64_t panel,
                                                  int64_t block_begin, int64_t, uint8_t*) {
    return run.codes + panel * run.stride_bytes + block_begin * kBlockSize;
  }
};

// One panel times few rows, those at `x` interleaved by pieces of kStreamRows.
template <typename Micro>
static inline void StreamPanel(const TernaryRun& run, const uint8_t* codes, const int8_t* x,
                               Ahead& ahead, const OutputTile& out) {
  ahead.step = 64 / ((run.num_rows + Micro::kStreamRows - 1) / Micro::kStreamRows);
  ForPieces(run.num_rows, Micro::kStreamRows, [&](int64_t begin, int64_t end) {
    OutputTile piece = out;
    piece.y += begin * out.y_stride;
    piece.num_rows = static_cast<int>(end - begin);
    piece.x_scales += begin;
    piece.x_sums += begin;
    Micro::Stream(
        {codes, x + begin * run.num_blocks * kBlockInputs, run.num_blocks, &ahead, piece});
  });
}

// Few rows: every panel is read once from memory; further pieces of rows find it in L1 or L2.
template <typename Micro>
static void StreamPanels(const TernaryRun& run) {
  int8_t* const x = reinterpret_cast<int8_t*>(run.scratch);
  InterleaveRows(run.x, run.x_stride, run.num_rows, Micro::kStreamRows, run.num_blocks, x);
  for (int64_t panel = 0; panel < NumPanels(run); ++panel) {
    const uint8_t* codes = run.codes + panel * run.stride_bytes;
    Ahead ahead = {codes + kStreamAhead, codes + kStreamAhead + run.stride_bytes};
    StreamPanel<Micro>(run, codes, x, ahead, Outputs(run, panel, 0, run.num_rows));
  }
}

// Rows [row_begin, row_end) times the blocks [block_begin, block_end) of all panels.
template <typename Micro, typename Blocks>
static void TileBlock(const TernaryRun& run, int64_t row_begin, int64_t row_end,
                      int64_t block_begin, int64_t block_end) {
  const int64_t num_rows = row_end - row_begin, num_blocks = block_end - block_begin;
  uint8_t* const unpacked = run.scratch;
  int8_t* const x = reinterpret_cast<int8_t*>(run.scratch + kUnpackedPanelSize);
  uint8_t* const converted = run.scratch + kUnpackedPanelSize + kTileRowsSize;
  InterleaveRows(run.x + row_begin * run.x_stride + block_begin * kBlockInputs, run.x_stride,
                 num_rows, Micro::kTileRows, num_blocks, x);
  for (int64_t panel = 0; panel < NumPanels(run); ++panel) {
    Micro::Unpack(Blocks::Get(run, panel, block_begin, num_blocks, converted), num_blocks,
                  unpacked);
    ForPieces(num_rows, Micro::kTileRows, [&](int64_t begin, int64_t end) {
      Micro::Tile({unpacked, x + begin * num_blocks * kBlockInputs, num_blocks, block_begin == 0,
                   block_end == run.num_blocks,
                   Outputs(run, panel, row_begin + begin, row_begin + end)});
    });
  }
}

// Many rows: codes are unpacked once per block of rows and reused from cache.
template <typename Micro, typename Blocks>
static void TilePanels(const TernaryRun& run) {
  ForPieces(run.num_rows, kRowBlock, [&](int64_t row_begin, int64_t row_end) {
    ForPieces(run.num_blocks, kStretchBlocks, [&](int64_t block_begin, int64_t block_end) {
      TileBlock<Micro, Blocks>(run, row_begin, row_end, block_begin, block_end);
    });
  });
}

template <typename Micro>
static void RunPanelsWith(const TernaryRun& run) {
  const int64_t x_size = run.num_rows * run.num_blocks * kBlockInputs;
  if (run.num_rows <= Micro::kMaxStreamedRows && x_size <= kScratchSize) {
    StreamPanels<Micro>(run);
  } else {
    TilePanels<Micro, PanelBlocks>(run);
  }
}

}  // namespace ternion::kernels
