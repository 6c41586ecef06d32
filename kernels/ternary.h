// Packed ternary matrices.
//
// A weight w in {-1, 0, +1} is stored as the 2-bit code w + 1 in {0, 1, 2}. Kernels multiply codes as
// they are and subtract the row's sum of activations once:
//   sum_k w_k x_k = sum_k code_k x_k - sum_k x_k.
//
// Panel layout. 16 output rows form a panel; a panel is a run of 64-byte blocks, one per 16 input
// columns, so that a thread that walks panels reads one contiguous stream:
//
//   block b of panel p: rows 16p .. 16p+15, columns 16b .. 16b+15
//   byte 4r + j (r = 0..15, j = 0..3) holds four codes of row 16p + r:
//      bits  7 6 | 5 4 | 3 2 | 1 0
//      col  12+j | 8+j | 4+j |  j      (+ 16b)
//
// Masking one 2-bit field of a whole block leaves 64 bytes = 16 rows x 4 consecutive columns: what one
// 512-bit dpbusd multiplies with a broadcast dword of activations. Rows past the matrix and columns past
// it are code 0; activations there are 0, so they add nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/buffer.h"
#include "base/checked.h"

namespace ternion::kernels {

inline constexpr int kPanelRows = 16;
inline constexpr int kBlockColumns = 16;
inline constexpr int kBlockBytes = 64;

// Largest number of input columns: the in-place masked accumulators hold 64 * 2 * 128 per product.
inline constexpr int64_t kMaxColumns = int64_t{1} << 16;

// A view; the memory belongs to an OwnedTernaryMatrix (or a device buffer).
struct TernaryMatrix {
  const uint8_t* codes = nullptr;  // panels, see above
  float scale = 0;                 // g: y = sum_k w_k x_k * g
  int64_t rows = 0;                // outputs
  int64_t columns = 0;             // inputs

  int64_t num_panels() const { return base::CeilDiv(rows, kPanelRows); }
  int64_t panel_bytes() const { return base::CeilDiv(columns, kBlockColumns) * kBlockBytes; }
  int64_t bytes() const { return num_panels() * panel_bytes(); }
};

struct OwnedTernaryMatrix {
  base::Buffer codes;
  TernaryMatrix view;
};

// Packed bytes of a [rows, columns] matrix.
constexpr int64_t TernaryBytes(int64_t rows, int64_t columns) {
  return base::CeilDiv(rows, kPanelRows) * base::CeilDiv(columns, kBlockColumns) * kBlockBytes;
}

// An all-(-1)-coded matrix of the given shape, to be filled by one of the functions below.
OwnedTernaryMatrix MakeTernaryMatrix(int64_t rows, int64_t columns, float scale);

// Packs rows [row_begin, row_end) from `weights` (int8 [rows, columns], values -1, 0, 1) into `codes`.
// Row ranges that do not share a panel may be packed concurrently.
void PackTernary(const int8_t* weights, int64_t row_begin, int64_t row_end, int64_t columns,
                 uint8_t* codes);

// The same from the HF packing, uint8 [ceil(rows/4), columns]: field i (bits 2i, 2i+1) of packed row r is
// output row i * ceil(rows/4) + r. Returns false when a code 3 is met (not a ternary matrix).
bool RepackHf(const uint8_t* packed, int64_t rows, int64_t columns, int64_t row_begin, int64_t row_end,
              uint8_t* codes);

// Inverse of PackTernary, for tests and conversion: weights int8 [rows, columns].
void UnpackTernary(const TernaryMatrix& matrix, int8_t* weights);

}  // namespace ternion::kernels
