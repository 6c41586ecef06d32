// How one thread walks its panels: which weights and activations are in which cache when. The
// arithmetic is the template argument Micro, a type of internal linkage of one
// ternary_<variant>.cc:
//
//   kStreamRows, kTileRows, kTilePanels   the most rows (and panels) of the two kernels
//   Stream(StreamArgs)   one panel, straight from its 2-bit codes, times a few rows
//   Unpack(...)          2-bit codes of some blocks -> bytes, ordered as Tile reads them
//   Tile(TileArgs)       a register tile: unpacked panels times rows, over one stretch of columns
//
// Included by files compiled for one instruction set: no std::, nothing inline from other headers.
#pragma once

#include <cstdint>

#include "kernels/cpu/ternary_panels.h"

namespace ternion::kernels {

// y = float(dot - sum) * (weight_scale * x_scale) for one panel.
struct StreamArgs {
  const uint8_t* codes;  // the panel
  int64_t num_blocks;
  int num_outputs;  // 1 .. 16
  float weight_scale;
  const int8_t* x;  // [num_rows, x_stride]
  int64_t x_stride;
  const float* x_scales;
  const int32_t* x_sums;
  int num_rows;  // 1 .. kStreamRows
  float* y;
  int64_t y_stride;
};

// Columns are done in stretches. Between them, y holds the int32 sums so far.
struct TileArgs {
  const uint8_t* unpacked;  // num_panels panels, kUnpackedPanelBytes apart: a byte per code
  int num_panels;           // 1 .. kTilePanels
  int64_t num_blocks;       // of this stretch
  int num_outputs;          // in these panels
  float weight_scale;
  const int8_t* x;  // [num_rows, x_stride], at the stretch's first column
  int64_t x_stride;
  const float* x_scales;
  const int32_t* x_sums;
  int num_rows;  // 1 .. kTileRows
  float* y;
  int64_t y_stride;
  bool first;  // start from 0, not from the sums in y
  bool last;   // write floats, not sums
};

// A stretch is 2,048 columns: the register tile is loaded and stored rarely, and kRowBlock rows of
// it (480 KB) stay in L2 while all panels pass by.
constexpr int64_t kStretchBlocks = 128;
constexpr int64_t kRowBlock = 240;
constexpr int64_t kPackedBlockBytes = 64;
constexpr int64_t kRowsPerPanel = 16;
constexpr int64_t kUnpackedBlockBytes = 4 * kPackedBlockBytes;
constexpr int64_t kUnpackedPanelBytes = kStretchBlocks * kUnpackedBlockBytes;

static inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(begin, end) for pieces of at most `max` elements, as even as they can be.
template <typename Body>
static inline void ForPieces(int64_t count, int64_t max, const Body& body) {
  const int64_t pieces = (count + max - 1) / max;
  for (int64_t i = 0; i < pieces; ++i) body(count * i / pieces, count * (i + 1) / pieces);
}

// Few rows: every panel is read once from memory; further pieces of rows find it in L1 or L2.
template <typename Micro>
static void StreamPanels(const PanelRun& run) {
  for (int64_t output = 0; output < run.num_outputs; output += kRowsPerPanel) {
    ForPieces(run.num_rows, Micro::kStreamRows, [&](int64_t begin, int64_t end) {
      Micro::Stream({run.codes + output / kRowsPerPanel * run.num_blocks * kPackedBlockBytes,
                     run.num_blocks, static_cast<int>(Min(kRowsPerPanel, run.num_outputs - output)),
                     run.weight_scale, run.x + begin * run.x_stride, run.x_stride,
                     run.x_scales + begin, run.x_sums + begin, static_cast<int>(end - begin),
                     run.y + begin * run.y_stride + output, run.y_stride});
    });
  }
}

// Rows [row_begin, row_end) times the blocks [block_begin, block_end) of all panels.
template <typename Micro>
static void TileBlock(const PanelRun& run, int64_t row_begin, int64_t row_end, int64_t block_begin,
                      int64_t block_end) {
  constexpr int64_t kTileOutputs = Micro::kTilePanels * kRowsPerPanel;
  const int64_t panel_bytes = run.num_blocks * kPackedBlockBytes;
  for (int64_t output = 0; output < run.num_outputs; output += kTileOutputs) {
    const int64_t num_outputs = Min(kTileOutputs, run.num_outputs - output);
    const int64_t num_panels = (num_outputs + kRowsPerPanel - 1) / kRowsPerPanel;
    for (int64_t p = 0; p < num_panels; ++p) {
      const uint8_t* panel = run.codes + (output / kRowsPerPanel + p) * panel_bytes;
      Micro::Unpack(panel + block_begin * kPackedBlockBytes, block_end - block_begin,
                    run.scratch + p * kUnpackedPanelBytes);
    }
    ForPieces(row_end - row_begin, Micro::kTileRows, [&](int64_t begin, int64_t end) {
      const int64_t row = row_begin + begin;
      Micro::Tile({run.scratch, static_cast<int>(num_panels), block_end - block_begin,
                   static_cast<int>(num_outputs), run.weight_scale,
                   run.x + row * run.x_stride + block_begin * kRowsPerPanel, run.x_stride,
                   run.x_scales + row, run.x_sums + row, static_cast<int>(end - begin),
                   run.y + row * run.y_stride + output, run.y_stride, block_begin == 0,
                   block_end == run.num_blocks});
    });
  }
}

// Many rows: codes are unpacked once per block of rows and reused from cache.
template <typename Micro>
static void TilePanels(const PanelRun& run) {
  ForPieces(run.num_rows, kRowBlock, [&](int64_t row_begin, int64_t row_end) {
    ForPieces(run.num_blocks, kStretchBlocks, [&](int64_t block_begin, int64_t block_end) {
      TileBlock<Micro>(run, row_begin, row_end, block_begin, block_end);
    });
  });
}

}  // namespace ternion::kernels
