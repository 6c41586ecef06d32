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
  int64_t first_row;  // output row of weights[0]

  __m128i Codes(int64_t row, int64_t column) const {
    const __m128i w = LoadRow(weights + (row - first_row) * columns, column, columns, 0xff);
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

// `v` is packed codes; gathers c & (c >> 1) of all codes c: not 0 once a code 3 was met.
void NoteThrees(__m128i& threes, __m128i v) {
  threes = _mm_or_si128(threes, _mm_and_si128(v, _mm_srli_epi16(v, 1)));
}

// The granules of four rows along 16 columns from the 16 codes of each: dword i of a
// row moves up by 2i bits, then a row's four dwords are merged into one.
__m128i MergeRows(const __m128i codes[kRowsAtOnce]) {
  const __m128i place = _mm_setr_epi16(1, 1, 4, 4, 16, 16, 64, 64);
  __m128i v[kRowsAtOnce];
  for (int i = 0; i < kRowsAtOnce; ++i) v[i] = _mm_mullo_epi16(codes[i], place);
  const __m128i v01 = _mm_or_si128(_mm_unpacklo_epi32(v[0], v[1]), _mm_unpackhi_epi32(v[0], v[1]));
  const __m128i v23 = _mm_or_si128(_mm_unpacklo_epi32(v[2], v[3]), _mm_unpackhi_epi32(v[2], v[3]));
  return _mm_or_si128(_mm_unpacklo_epi64(v01, v23), _mm_unpackhi_epi64(v01, v23));
}

// Packs rows [row, row + num_rows), num_rows 1 or 4 (then row is a multiple of 4), into granules
// along the columns.
template <int num_rows, typename Source>
__m128i PackRows(const Source& source, int64_t row, OwnedTernaryMatrix& matrix) {
  const TernaryMatrix& view = matrix.view;
  uint8_t* out[num_rows];
  for (int i = 0; i < num_rows; ++i) out[i] = matrix.codes.data() + view.GranuleOffset(row + i, 0);
  const int64_t step = view.layout == TernaryLayout::kPanels ? kBlockBytes : kGranuleBytes;
  __m128i threes = _mm_setzero_si128();
  for (int64_t b = 0; b < view.num_blocks(); ++b) {
    __m128i v[kRowsAtOnce] = {};
    for (int i = 0; i < num_rows; ++i) v[i] = source.Codes(row + i, b * kBlockColumns);
    alignas(16) uint8_t granules[kRowsAtOnce * kGranuleBytes];
    const __m128i merged = MergeRows(v);
    _mm_store_si128(reinterpret_cast<__m128i*>(granules), merged);
    NoteThrees(threes, merged);
    for (int i = 0; i < num_rows; ++i) {
      std::memcpy(out[i] + b * step, granules + i * kGranuleBytes, kGranuleBytes);
    }
  }
  return threes;
}

// bytes[j] holds byte j of the granules of 16 columns: puts them in place, at `out` and every
// stride_bytes from there. Codes that are there already stay: neighbours may have filled their
// rows.
void MergeIntoColumns(const __m128i bytes[kGranuleBytes], int64_t num_columns, int64_t stride_bytes,
                      uint8_t* out) {
  const __m128i low01 = _mm_unpacklo_epi8(bytes[0], bytes[1]);
  const __m128i high01 = _mm_unpackhi_epi8(bytes[0], bytes[1]);
  const __m128i low23 = _mm_unpacklo_epi8(bytes[2], bytes[3]);
  const __m128i high23 = _mm_unpackhi_epi8(bytes[2], bytes[3]);
  alignas(16) uint32_t granules[kBlockColumns];
  __m128i* const to = reinterpret_cast<__m128i*>(granules);
  _mm_store_si128(to, _mm_unpacklo_epi16(low01, low23));
  _mm_store_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
  _mm_store_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
  _mm_store_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
  for (int64_t c = 0; c < num_columns; ++c, out += stride_bytes) {
    uint32_t old;
    std::memcpy(&old, out, sizeof(old));
    old |= granules[c];
    std::memcpy(out, &old, sizeof(old));
  }
}

// f(block, b): all blocks of 16 columns for panels [begin, end), a few columns at a time: the lines
// that are written then stay in cache until their granules are complete.
template <typename F>
void ForColumnBlocks(int64_t num_blocks, int64_t panel_begin, int64_t panel_end, F f) {
  constexpr int64_t kBlocksAtOnce = 4;
  for (int64_t first = 0; first < num_blocks; first += kBlocksAtOnce) {
    const int64_t last = std::min(first + kBlocksAtOnce, num_blocks);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int64_t b = first; b < last; ++b) f(panel, b);
    }
  }
}

// Packs rows [row_begin, row_end) into granules along the rows.
template <typename Source>
__m128i PackColumns(const Source& source, int64_t row_begin, int64_t row_end,
                    OwnedTernaryMatrix& matrix) {
  const TernaryMatrix& view = matrix.view;
  __m128i threes = _mm_setzero_si128();
  const auto pack = [&](int64_t panel, int64_t b) {
    const int64_t row = panel * kPanelRows, column = b * kBlockColumns;
    __m128i bytes[kGranuleBytes] = {};
    for (int i = 0; i < kPanelRows; ++i) {
      if (row + i < row_begin || row + i >= row_end) continue;
      const __m128i place = _mm_cvtsi32_si128(i / kGranuleBytes * 2);
      __m128i& byte = bytes[i % kGranuleBytes];
      byte = _mm_or_si128(byte, _mm_sll_epi16(source.Codes(row + i, column), place));
    }
    for (const __m128i& byte : bytes) NoteThrees(threes, byte);
    MergeIntoColumns(bytes, std::min<int64_t>(kBlockColumns, view.columns - column),
                     view.stride_bytes(), matrix.codes.data() + view.GranuleOffset(row, column));
  };
  if (row_begin < row_end) {
    ForColumnBlocks(view.num_blocks(), row_begin / kPanelRows, base::CeilDiv(row_end, kPanelRows),
                    pack);
  }
  return threes;
}

// The thread that has the operands of (row, column) in tiles.
constexpr int ThreadOf(int64_t row, int64_t column) {
  return static_cast<int>(row % 8 * 4 + column % kTileColumns / 16);
}
// Where a code stands in kTiles: its byte, and its lowest bit there.
struct TilePlace {
  int64_t byte = 0;
  int bit = 0;
};
TilePlace PlaceInTiles(const TernaryMatrix& view, int64_t row, int64_t column) {
  const int64_t block = row / kPanelRows * view.stride_bytes() + column / kTileColumns * kTileBytes;
  const int64_t field = column % 8 / 4 * 2 + row % kPanelRows / 8;
  return {block + ThreadOf(row, column) * 8 + column % 16 / 8 * 4 + column % 4,
          static_cast<int>(2 * field)};
}

// Packs rows [row_begin, row_end) into tiles.
template <typename Source>
__m128i PackTiles(const Source& source, int64_t row_begin, int64_t row_end,
                  OwnedTernaryMatrix& matrix) {
  const TernaryMatrix& view = matrix.view;
  __m128i threes = _mm_setzero_si128();
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t column = 0; column < view.columns; column += kBlockColumns) {
      const __m128i codes = source.Codes(row, column);
      NoteThrees(threes, codes);
      alignas(16) uint32_t quads[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(quads), codes);
      const TilePlace place = PlaceInTiles(view, row, column);
      uint32_t words[2];
      uint8_t* out = matrix.codes.data() + place.byte;
      std::memcpy(words, out, sizeof(words));  // the row eight below may be there
      words[0] |= (quads[0] | quads[1] << 4) << place.bit;
      words[1] |= (quads[2] | quads[3] << 4) << place.bit;
      std::memcpy(out, words, sizeof(words));
    }
  }
  return threes;
}

// In kTilesBase3.
int64_t Base3Offset(const TernaryMatrix& view, int64_t row, int64_t column) {
  return row / kPanelRows * view.stride_bytes() +
         column / kBase3Columns * static_cast<int64_t>(sizeof(Base3Block));
}
constexpr int OperandOf(int64_t row, int64_t column) {
  return static_cast<int>(column % kBase3Columns / kTileColumns * 8 + column % 16 / 4 * 2 +
                          row % kPanelRows / 8);
}

// All codes of a block, by thread and operand.
using BlockCodes = uint32_t[kThreadsOfBlock][kOperandsOfBlock];

void PackBlock(const BlockCodes& codes, Base3Block& block) {
  // The values of bytes first, in one loop each that vectors can do.
  for (int t = 0; t < kThreadsOfBlock; ++t) {
    uint32_t words[3] = {};  // no byte of a sum gets past 242
    for (int i = 0; i < 3 * kTritsOfByte; ++i) {
      words[i / kTritsOfByte] = words[i / kTritsOfByte] * 3 + codes[t][i];
    }
    std::memcpy(block.left[t], words, sizeof(block.left[t]));
    block.right[t] = words[2];
    const uint32_t last = codes[t][kOperandsOfBlock - 1];
    block.last[t] = static_cast<uint8_t>((last & 0xff) * 81 + (last >> 8 & 0xff) * 27 +
                                         (last >> 16 & 0xff) * 9 + (last >> 24) * 3);
  }
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(&block);
  for (size_t i = 0; i < sizeof(block); ++i) bytes[i] = PackTrits(bytes[i]);
}

Base3Block LoadBlock(const TernaryMatrix& view, int64_t row, int64_t column) {
  Base3Block block;
  std::memcpy(&block, view.codes + Base3Offset(view, row, column), sizeof(block));
  return block;
}

// Adds to a block, whose first column is `column`, the codes of rows [row_begin, row_end) of its
// panel, which are 0 there.
template <typename Source>
void AddCodes(const Source& source, int64_t row_begin, int64_t row_end, int64_t column,
              int64_t columns, BlockCodes& block, __m128i& threes) {
  const int64_t end = std::min(column + kBase3Columns, columns);
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t c = column; c < end; c += kBlockColumns) {
      const __m128i codes = source.Codes(row, c);
      NoteThrees(threes, codes);
      alignas(16) uint32_t quads[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(quads), codes);
      uint32_t* const operands = block[ThreadOf(row, c)] + OperandOf(row, c);
      for (int i = 0; i < 4; ++i) operands[2 * i] = quads[i];
    }
  }
}

// Packs rows [row_begin, row_end) into tiles of base 3, a block at a time.
template <typename Source>
__m128i PackBase3(const Source& source, int64_t row_begin, int64_t row_end,
                  OwnedTernaryMatrix& matrix) {
  const TernaryMatrix& view = matrix.view;
  __m128i threes = _mm_setzero_si128();
  for (int64_t row = row_begin, end; row < row_end; row = end) {
    end = std::min<int64_t>(base::RoundUp(row + 1, kPanelRows), row_end);
    for (int64_t column = 0; column < view.columns; column += kBase3Columns) {
      BlockCodes codes = {};
      if (end - row < kPanelRows) {  // the panel's other rows may be there
        const Base3Block old = LoadBlock(view, row, column);
        for (int t = 0; t < kThreadsOfBlock; ++t) WordsOfThread(old, t).Unpack(codes[t]);
      }
      AddCodes(source, row, end, column, view.columns, codes, threes);
      Base3Block block;
      PackBlock(codes, block);
      std::memcpy(matrix.codes.data() + Base3Offset(view, row, column), &block, sizeof(block));
    }
  }
  return threes;
}

// The code of (row, column).
int CodeAt(const TernaryMatrix& view, int64_t row, int64_t column) {
  if (view.layout == TernaryLayout::kTilesBase3) {
    uint32_t operands[kOperandsOfBlock];
    WordsOfThread(LoadBlock(view, row, column), ThreadOf(row, column)).Unpack(operands);
    return operands[OperandOf(row, column)] >> column % 4 * 8 & 3;
  }
  if (view.layout == TernaryLayout::kTiles) {
    const TilePlace place = PlaceInTiles(view, row, column);
    return view.codes[place.byte] >> place.bit & 3;
  }
  const int64_t code = (view.layout == TernaryLayout::kColumns ? row : column) % kGranuleCodes;
  const int64_t byte = view.GranuleOffset(row, column) + code % kGranuleBytes;
  return view.codes[byte] >> code / kGranuleBytes * 2 & 3;
}

// `threes` is the OR of c & (c >> 1) over codes c.
bool NoThrees(__m128i threes) {
  const __m128i found = _mm_and_si128(threes, _mm_set1_epi8(0x55));
  return _mm_movemask_epi8(_mm_cmpeq_epi8(found, _mm_setzero_si128())) == 0xffff;
}

// Returns false when a code 3 was met.
template <typename Source>
bool PackRowRange(const Source& source, int64_t row_begin, int64_t row_end,
                  OwnedTernaryMatrix& matrix) {
  if (matrix.view.layout == TernaryLayout::kColumns) {
    return NoThrees(PackColumns(source, row_begin, row_end, matrix));
  }
  if (matrix.view.layout == TernaryLayout::kTiles) {
    return NoThrees(PackTiles(source, row_begin, row_end, matrix));
  }
  if (matrix.view.layout == TernaryLayout::kTilesBase3) {
    return NoThrees(PackBase3(source, row_begin, row_end, matrix));
  }
  __m128i threes = _mm_setzero_si128();
  for (int64_t row = row_begin; row < row_end;) {
    if (row % kRowsAtOnce == 0 && row + kRowsAtOnce <= row_end) {
      threes = _mm_or_si128(threes, PackRows<kRowsAtOnce>(source, row, matrix));
      row += kRowsAtOnce;
    } else {
      threes = _mm_or_si128(threes, PackRows<1>(source, row, matrix));
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

// Field i of v[f] becomes field f of v[i].
void SwapFields(__m128i v[4]) {
  SwapBits(v[0], v[2], 4, 0x0f);
  SwapBits(v[1], v[3], 4, 0x0f);
  SwapBits(v[0], v[1], 2, 0x33);
  SwapBits(v[2], v[3], 2, 0x33);
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
  SwapFields(v);
}

// RepackHf of a whole matrix whose packed rows are a multiple of 4: all fields in one pass, at
// about the speed of a copy.
bool RepackWholeRows(const uint8_t* packed, int64_t packed_rows, OwnedTernaryMatrix& matrix) {
  const TernaryMatrix& view = matrix.view;
  const bool panels = view.layout == TernaryLayout::kPanels;
  __m128i threes = _mm_setzero_si128();
  for (int64_t row = 0; row < packed_rows; row += kRowsAtOnce) {
    uint8_t* out[4];
    for (int i = 0; i < 4; ++i) {
      out[i] = matrix.codes.data() + view.GranuleOffset(i * packed_rows + row, 0);
    }
    for (int64_t b = 0; b < view.num_blocks(); ++b) {
      __m128i v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = LoadRow(packed + (row + i) * view.columns, b * kBlockColumns, view.columns, 0);
        NoteThrees(threes, v[i]);
      }
      TransposeFields(v);
      for (int i = 0; i < 4; ++i) {
        if (panels) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i] + b * kBlockBytes), v[i]);
          continue;
        }
        for (int r = 0; r < kRowsAtOnce; ++r, v[i] = _mm_srli_si128(v[i], kGranuleBytes)) {
          const int32_t granule = _mm_cvtsi128_si32(v[i]);
          std::memcpy(out[i] + r * view.stride_bytes() + b * kGranuleBytes, &granule,
                      kGranuleBytes);
        }
      }
    }
  }
  return NoThrees(threes);
}

// The same into columns, when packed rows are a multiple of 16.
bool RepackWholeColumns(const uint8_t* packed, int64_t packed_rows, OwnedTernaryMatrix& matrix) {
  const TernaryMatrix& view = matrix.view;
  __m128i threes = _mm_setzero_si128();
  ForColumnBlocks(view.num_blocks(), 0, packed_rows / kPanelRows, [&](int64_t panel, int64_t b) {
    const int64_t row = panel * kPanelRows, column = b * kBlockColumns;
    __m128i bytes[4][kGranuleBytes];  // of each of the four outputs' panels
    for (int j = 0; j < kGranuleBytes; ++j) {
      __m128i v[4];
      for (int f = 0; f < 4; ++f) {
        v[f] = LoadRow(packed + (row + 4 * f + j) * view.columns, column, view.columns, 0);
        NoteThrees(threes, v[f]);
      }
      SwapFields(v);
      for (int i = 0; i < 4; ++i) bytes[i][j] = v[i];
    }
    for (int i = 0; i < 4; ++i) {
      const int64_t granule = view.GranuleOffset(i * packed_rows + row, column);
      MergeIntoColumns(bytes[i], std::min<int64_t>(kBlockColumns, view.columns - column),
                       view.stride_bytes(), matrix.codes.data() + granule);
    }
  });
  return NoThrees(threes);
}

}  // namespace

OwnedTernaryMatrix MakeTernaryMatrix(int64_t rows, int64_t columns, float scale,
                                     TernaryLayout layout) {
  OwnedTernaryMatrix matrix;
  matrix.codes = base::Buffer(TernaryBytes(rows, columns, layout));
  matrix.view = {matrix.codes.data(), scale, rows, columns, layout};
  return matrix;
}

void PackTernary(const int8_t* weights, int64_t row_begin, int64_t row_end,
                 OwnedTernaryMatrix& matrix) {
  PackRowRange(Int8Source{weights, matrix.view.columns, row_begin}, row_begin, row_end, matrix);
}

bool RepackHf(const uint8_t* packed, int64_t row_begin, int64_t row_end,
              OwnedTernaryMatrix& matrix) {
  const int64_t rows = matrix.view.rows, packed_rows = base::CeilDiv(rows, 4);
  const bool tiles = matrix.view.layout == TernaryLayout::kTiles ||
                     matrix.view.layout == TernaryLayout::kTilesBase3;
  if (row_begin == 0 && row_end == rows && rows == 4 * packed_rows && !tiles) {
    const bool columns = matrix.view.layout == TernaryLayout::kColumns;
    if (columns && packed_rows % kPanelRows == 0) {
      return RepackWholeColumns(packed, packed_rows, matrix);
    }
    if (!columns && packed_rows % kRowsAtOnce == 0) {
      return RepackWholeRows(packed, packed_rows, matrix);
    }
  }
  bool ternary = true;
  for (int field = 0; field < 4; ++field) {
    const int64_t first_row = field * packed_rows;
    const HfSource source{packed, matrix.view.columns, first_row, _mm_cvtsi32_si128(2 * field)};
    const int64_t begin = std::max(row_begin, first_row);
    const int64_t end = std::min({row_end, rows, first_row + packed_rows});
    ternary &= PackRowRange(source, begin, end, matrix);
  }
  return ternary;
}

void UnpackTernary(const TernaryMatrix& matrix, int8_t* weights) {
  for (int64_t row = 0; row < matrix.rows; ++row) {
    for (int64_t column = 0; column < matrix.columns; ++column) {
      weights[row * matrix.columns + column] = static_cast<int8_t>(CodeAt(matrix, row, column) - 1);
    }
  }
}

}  // namespace ternion::kernels
