#include "kernels/ternary.h"

#include <emmintrin.h>

#include <algorithm>
#include <cstring>

namespace ternion::kernels {
namespace {

constexpr int kRowsAtOnce = 4;  // 4 rows of a block are 16 consecutive packed bytes

// 16 bytes of a row from `column` on; bytes past the row are `pad`.
__m128i LoadRow(const void* row, int64_t column, int64_t columns, uint8_t pad) {
  const uint8_t* begin = static_cast<const uint8_t*>(row) + column;
  if (column + kBlockColumns <= columns) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin));
  }
  alignas(16) uint8_t padded[kBlockColumns];
  std::memset(padded, pad, sizeof(padded));
  std::memcpy(padded, begin, columns - column);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(padded));
}

// Where codes come from. Codes(row, column) gives 16 codes, one per byte, those past the matrix 0.
struct Int8Source {
  const int8_t* weights;
  int64_t columns;

  __m128i Codes(int64_t row, int64_t column) const {
    const __m128i w = LoadRow(weights + row * columns, column, columns, 0xff);
    return _mm_add_epi8(w, _mm_set1_epi8(1));
  }
};

struct HfSource {
  const uint8_t* packed;
  int64_t columns;
  int64_t first_row;  // output row of packed row 0 in this field
  __m128i shift;      // 2 * field

  __m128i Codes(int64_t row, int64_t column) const {
    const uint8_t* packed_row = packed + (row - first_row) * columns;
    const __m128i fields = LoadRow(packed_row, column, columns, 0);
    return _mm_and_si128(_mm_srl_epi16(fields, shift), _mm_set1_epi8(3));
  }
};

// The block's bytes of four rows from the 16 codes of each: dword i of a row moves up by 2i bits,
// then a row's four dwords are merged into one.
__m128i MergeRows(const __m128i codes[kRowsAtOnce]) {
  const __m128i place = _mm_setr_epi16(1, 1, 4, 4, 16, 16, 64, 64);
  __m128i v[kRowsAtOnce];
  for (int i = 0; i < kRowsAtOnce; ++i) v[i] = _mm_mullo_epi16(codes[i], place);
  const __m128i v01 = _mm_or_si128(_mm_unpacklo_epi32(v[0], v[1]), _mm_unpackhi_epi32(v[0], v[1]));
  const __m128i v23 = _mm_or_si128(_mm_unpacklo_epi32(v[2], v[3]), _mm_unpackhi_epi32(v[2], v[3]));
  return _mm_or_si128(_mm_unpacklo_epi64(v01, v23), _mm_unpackhi_epi64(v01, v23));
}

// Packs rows [row, row + num_rows) of one panel, num_rows 1 or 4 (then row is a multiple of 4).
// Returns the OR of c & (c >> 1) over all codes: bit 0 of a field is set when a code 3 was met.
template <int num_rows, typename Source>
__m128i PackRows(const Source& source, int64_t row, uint8_t* codes) {
  const int64_t num_blocks = base::CeilDiv(source.columns, kBlockColumns);
  uint8_t* out = codes + (row / kPanelRows * num_blocks * kBlockBytes) + row % kPanelRows * 4;
  __m128i threes = _mm_setzero_si128();
  for (int64_t b = 0; b < num_blocks; ++b, out += kBlockBytes) {
    __m128i v[kRowsAtOnce] = {};
    for (int i = 0; i < num_rows; ++i) v[i] = source.Codes(row + i, b * kBlockColumns);
    const __m128i merged = MergeRows(v);
    threes = _mm_or_si128(threes, _mm_and_si128(merged, _mm_srli_epi16(merged, 1)));
    std::memcpy(out, &merged, 4 * num_rows);
  }
  return threes;
}

// `threes` is the OR of c & (c >> 1) over codes c.
bool NoThrees(__m128i threes) {
  const __m128i found = _mm_and_si128(threes, _mm_set1_epi8(0x55));
  return _mm_movemask_epi8(_mm_cmpeq_epi8(found, _mm_setzero_si128())) == 0xffff;
}

// Returns false when a code 3 was met.
template <typename Source>
bool PackRowRange(const Source& source, int64_t row_begin, int64_t row_end, uint8_t* codes) {
  __m128i threes = _mm_setzero_si128();
  for (int64_t row = row_begin; row < row_end;) {
    if (row % kRowsAtOnce == 0 && row + kRowsAtOnce <= row_end) {
      threes = _mm_or_si128(threes, PackRows<kRowsAtOnce>(source, row, codes));
      row += kRowsAtOnce;
    } else {
      threes = _mm_or_si128(threes, PackRows<1>(source, row, codes));
      ++row;
    }
  }
  return NoThrees(threes);
}

// Exchanges the bits of a under mask << shift with the bits of b under mask.
void SwapBits(__m128i& a, __m128i& b, int shift, char mask) {
  const __m128i differ =
      _mm_and_si128(_mm_xor_si128(_mm_srli_epi16(a, shift), b), _mm_set1_epi8(mask));
  a = _mm_xor_si128(a, _mm_slli_epi16(differ, shift));
  b = _mm_xor_si128(b, differ);
}

// In: 16 bytes of each of four packed rows, four fields a byte. Out: v[i] is what MergeRows makes
// of field i.
void TransposeFields(__m128i v[4]) {
  const __m128i low01 = _mm_unpacklo_epi32(v[0], v[1]), high01 = _mm_unpackhi_epi32(v[0], v[1]);
  const __m128i low23 = _mm_unpacklo_epi32(v[2], v[3]), high23 = _mm_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm_unpacklo_epi64(low01, low23);  // dword 0 of every row
  v[1] = _mm_unpackhi_epi64(low01, low23);
  v[2] = _mm_unpacklo_epi64(high01, high23);
  v[3] = _mm_unpackhi_epi64(high01, high23);
  SwapBits(v[0], v[2], 4, 0x0f);
  SwapBits(v[1], v[3], 4, 0x0f);
  SwapBits(v[0], v[1], 2, 0x33);
  SwapBits(v[2], v[3], 2, 0x33);
}

// RepackHf of a whole matrix whose packed rows are a multiple of 4: all fields in one pass, at
// about the speed of a copy.
bool RepackWhole(const uint8_t* packed, int64_t packed_rows, int64_t columns, uint8_t* codes) {
  const int64_t num_blocks = base::CeilDiv(columns, kBlockColumns);
  __m128i threes = _mm_setzero_si128();
  for (int64_t row = 0; row < packed_rows; row += kRowsAtOnce) {
    uint8_t* out[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t output = i * packed_rows + row;
      out[i] = codes + output / kPanelRows * num_blocks * kBlockBytes + output % kPanelRows * 4;
    }
    for (int64_t b = 0; b < num_blocks; ++b) {
      __m128i v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = LoadRow(packed + (row + i) * columns, b * kBlockColumns, columns, 0);
        threes = _mm_or_si128(threes, _mm_and_si128(v[i], _mm_srli_epi16(v[i], 1)));
      }
      TransposeFields(v);
      for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i] + b * kBlockBytes), v[i]);
      }
    }
  }
  return NoThrees(threes);
}

}  // namespace

OwnedTernaryMatrix MakeTernaryMatrix(int64_t rows, int64_t columns, float scale) {
  OwnedTernaryMatrix matrix;
  matrix.codes = base::Buffer(TernaryBytes(rows, columns));
  matrix.view = {matrix.codes.data(), scale, rows, columns};
  return matrix;
}

void PackTernary(const int8_t* weights, int64_t row_begin, int64_t row_end, int64_t columns,
                 uint8_t* codes) {
  PackRowRange(Int8Source{weights, columns}, row_begin, row_end, codes);
}

bool RepackHf(const uint8_t* packed, int64_t rows, int64_t columns, int64_t row_begin,
              int64_t row_end, uint8_t* codes) {
  const int64_t packed_rows = base::CeilDiv(rows, 4);
  const bool whole = row_begin == 0 && row_end == rows && rows == 4 * packed_rows;
  if (whole && packed_rows % kRowsAtOnce == 0) {
    return RepackWhole(packed, packed_rows, columns, codes);
  }
  bool ternary = true;
  for (int field = 0; field < 4; ++field) {
    const int64_t first_row = field * packed_rows;
    const HfSource source{packed, columns, first_row, _mm_cvtsi32_si128(2 * field)};
    const int64_t begin = std::max(row_begin, first_row);
    const int64_t end = std::min({row_end, rows, first_row + packed_rows});
    ternary &= PackRowRange(source, begin, end, codes);
  }
  return ternary;
}

void UnpackTernary(const TernaryMatrix& matrix, int8_t* weights) {
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const uint8_t* panel = matrix.codes + row / kPanelRows * matrix.panel_bytes();
    for (int64_t column = 0; column < matrix.columns; ++column) {
      const uint8_t* block = panel + column / kBlockColumns * kBlockBytes;
      const uint8_t byte = block[row % kPanelRows * 4 + column % 4];
      const int code = byte >> (column % kBlockColumns / 4 * 2) & 3;
      weights[row * matrix.columns + column] = static_cast<int8_t>(code - 1);
    }
  }
}

}  // namespace ternion::kernels
