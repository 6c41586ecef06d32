// Packed ternary matrices.
//
// A weight w in {-1, 0, +1} is stored as the 2-bit code w + 1 in {0, 1, 2}. Kernels multiply codes
// as they are and subtract the row's sum of activations once:
//   sum_k w_k x_k = sum_k code_k x_k - sum_k x_k.
//
// The unit of every layout is the granule, 16 codes in 4 bytes; byte j = 0..3 holds four of them:
//      bits   7 6  |  5 4  |  3 2  | 1 0
//      code  12+j  |  8+j  |  4+j  |  j
//
// kPanels, when all of the matrix is wanted. 16 output rows form a panel; a panel is a run of
// 64-byte blocks, one per 16 input columns, so that a thread that walks panels reads one contiguous
// stream:
//   block b of panel p: rows 16p .. 16p+15, columns 16b .. 16b+15
//   bytes 4r .. 4r+3 (r = 0..15): the granule of row 16p + r along its 16 columns
// Masking one 2-bit field of a whole block leaves 64 bytes = 16 rows x 4 consecutive columns: what
// one 512-bit dpbusd multiplies with a broadcast dword of activations.
//
// kRows, when only some outputs are wanted (up of a relu2 feed-forward): a line per output row.
//   line r, bytes 4b .. 4b+3: the granule of row r along columns 16b .. 16b+15
//
// kColumns, when many inputs are 0 (down of a relu2 feed-forward): a line per input column.
//   line c, bytes 4p .. 4p+3: the granule of column c along rows 16p .. 16p+15
//
// kTiles, for tensor cores. A panel is a run of 256-byte blocks, one per 64 input columns; a block
// is eight bytes for each thread of a warp: its A operands of two products with 32 columns (PTX
// ISA, mma.m16n8k32 with 8-bit elements). Thread t has rows g = t / 4 and g + 8 of the panel and,
// of a block's columns, sixteen in a row: as the order of a product's columns is free, these are
// the B operands that one 16-byte load of activations gives.
//   block b, bytes 8t + 4i .. 8t + 4i + 3 (i = 0, 1), byte j, with c = 64b + 16 (t % 4) + 8i + j:
//      bits   7 6           |  5 4         |  3 2        | 1 0
//      code   g + 8, c + 4  |  g, c + 4    |  g + 8, c   | g, c
//
// kTilesBase3, the same for weights that fill memory: 1.625 bits a code instead of two. A block is
// 16 rows by 128 columns in 416 bytes, 13 for each thread: 16 operands r = 8h + 4i + f of four
// codes each, those that field f of the bytes j = 0..3 of its word i has in block 2b + h of kTiles.
//   block b, bytes 8t .. 8t + 7 and 256 + 4t .. 256 + 4t + 3, as three words w = 0..2: byte j has
//   codes j of operands 5w .. 5w + 4 as a fraction (kernels/ternary_base3.h)
//   byte 384 + t: codes 0..3 of operand 15, and 0
//
// Lines are padded to 64 bytes and their number to 16. All that lies past the matrix is code 0;
// activations there are 0, and outputs there are not stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/buffer.h"
#include "base/checked.h"
#include "kernels/ternary_base3.h"

namespace ternion::kernels {

inline constexpr int kPanelRows = 16;
inline constexpr int kBlockColumns = 16;
inline constexpr int kBlockBytes = 64;
inline constexpr int kGranuleCodes = 16;
inline constexpr int kGranuleBytes = 4;
inline constexpr int kLineBytes = 64;  // lines of kRows and kColumns are multiples of it
inline constexpr int kLineCodes = kLineBytes / kGranuleBytes * kGranuleCodes;
inline constexpr int kTileColumns = 64;  // of a block of kTiles
inline constexpr int kTileBytes = 256;
inline constexpr int kBase3Columns = 128;  // of a block of kTilesBase3

// Largest number of input columns: the in-place masked accumulators hold 64 * 2 * 128 per product.
inline constexpr int64_t kMaxColumns = int64_t{1} << 16;

enum class TernaryLayout : uint8_t { kPanels, kRows, kColumns, kTiles, kTilesBase3 };

// Whether rows stand together in panels of kPanelRows.
constexpr bool InPanels(TernaryLayout layout) {
  return layout != TernaryLayout::kRows && layout != TernaryLayout::kColumns;
}

// Bytes of one panel, or of one line, of a [rows, columns] matrix.
constexpr int64_t TernaryStrideBytes(int64_t rows, int64_t columns, TernaryLayout layout) {
  if (layout == TernaryLayout::kPanels) return base::CeilDiv(columns, kBlockColumns) * kBlockBytes;
  if (layout == TernaryLayout::kTiles) return base::CeilDiv(columns, kTileColumns) * kTileBytes;
  if (layout == TernaryLayout::kTilesBase3) {
    return base::CeilDiv(columns, kBase3Columns) * static_cast<int64_t>(sizeof(Base3Block));
  }
  const int64_t codes = layout == TernaryLayout::kRows ? columns : rows;
  return base::CeilDiv(codes, kLineCodes) * kLineBytes;
}

// Packed bytes of a [rows, columns] matrix.
constexpr int64_t TernaryBytes(int64_t rows, int64_t columns,
                               TernaryLayout layout = TernaryLayout::kPanels) {
  const int64_t stride = TernaryStrideBytes(rows, columns, layout);
  if (InPanels(layout)) return base::CeilDiv(rows, kPanelRows) * stride;
  return base::RoundUp(layout == TernaryLayout::kRows ? rows : columns, 16) * stride;
}

// A view; the memory belongs to an OwnedTernaryMatrix (or a device buffer).
struct TernaryMatrix {
  const uint8_t* codes = nullptr;  // in one of the layouts above
  float scale = 0;                 // g: y = sum_k w_k x_k * g
  int64_t rows = 0;                // outputs
  int64_t columns = 0;             // inputs
  TernaryLayout layout = TernaryLayout::kPanels;

  constexpr int64_t num_panels() const { return base::CeilDiv(rows, kPanelRows); }
  constexpr int64_t num_blocks() const {
    return base::CeilDiv(columns, kBlockColumns);
  }  // in a panel
  constexpr int64_t stride_bytes() const { return TernaryStrideBytes(rows, columns, layout); }
  constexpr int64_t bytes() const { return TernaryBytes(rows, columns, layout); }

  // First byte of the granule that holds the code of (row, column). Not for tiles.
  int64_t GranuleOffset(int64_t row, int64_t column) const {
    const int64_t panel = row / kPanelRows, block = column / kBlockColumns;
    switch (layout) {
      case TernaryLayout::kPanels:
        return panel * stride_bytes() + block * kBlockBytes + row % kPanelRows * kGranuleBytes;
      case TernaryLayout::kRows:
        return row * stride_bytes() + block * kGranuleBytes;
      default:
        return column * stride_bytes() + panel * kGranuleBytes;
    }
  }
};

struct OwnedTernaryMatrix {
  base::Buffer codes;
  TernaryMatrix view;

  void MoveTo(base::Memory& memory) {
    codes.MoveTo(memory);
    view.codes = codes.data();
  }
};

// An all-(-1)-coded matrix of the given shape, to be filled by one of the functions below.
OwnedTernaryMatrix MakeTernaryMatrix(int64_t rows, int64_t columns, float scale,
                                     TernaryLayout layout = TernaryLayout::kPanels);

// Packs rows [row_begin, row_end), each once, from `weights` (those rows: int8
// [row_end - row_begin, columns], values -1, 0, 1). Row ranges that do not share 16 rows (a panel)
// may be packed concurrently.
void PackTernary(const int8_t* weights, int64_t row_begin, int64_t row_end,
                 OwnedTernaryMatrix& matrix);

// The same from the HF packing of the whole matrix, uint8 [ceil(rows/4), columns]: field i (bits
// 2i, 2i+1) of packed row r is output row i * ceil(rows/4) + r. Returns false when a code 3 is met
// (not a ternary matrix).
bool RepackHf(const uint8_t* packed, int64_t row_begin, int64_t row_end,
              OwnedTernaryMatrix& matrix);

// Inverse of PackTernary, for tests and conversion: weights int8 [rows, columns].
void UnpackTernary(const TernaryMatrix& matrix, int8_t* weights);

}  // namespace ternion::kernels
