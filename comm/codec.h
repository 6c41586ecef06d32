// Row codecs: fp32 rows <-> wire bytes, at the precisions of WIRE formats.
//
//   format  bits  dispatch scale        combine scale
//   fp32    32    none                  none
//   bf16    16    none                  none
//   int8    8     fp32 per row          bf16 per 128 elements
//   int4    4     fp32 per row          bf16 per 32 elements   (two codes a byte, low nibble first)
//
// Dispatch at the model's own width (int8 for 8-bit activations, int4 for 4-bit) carries the codes
// that the experts will multiply: nothing is rounded. Combine formats round; fp32 does not.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/row_codec.h"

namespace ternion::comm {

using kernels::CodeBytes;
using kernels::RowFormat;

absl::string_view RowFormatName(RowFormat format);  // "fp32", ...
absl::StatusOr<RowFormat> ParseRowFormat(
    absl::string_view name);  // InvalidArgument names the choices

// Bytes of one combine row: scales (if any), then codes.
int64_t CombineRowBytes(RowFormat format, int64_t dim);

// int8 codes [dim] in -8..7 <-> packed nibbles [ceil(dim/2)].
void PackInt4(const int8_t* codes, int64_t dim, uint8_t* out);
void UnpackInt4(const uint8_t* packed, int64_t dim, int8_t* codes);

// fp32 [dim] <-> bf16 (round to nearest even), any alignment of the wire side.
void EncodeBf16(const float* x, int64_t dim, uint8_t* out);
void DecodeBf16(const uint8_t* bytes, int64_t dim, float* x);

// One combine row. int8: s = absmax of the block / 127, int4: absmax / 7, s rounded up to bf16;
// codes round half to even. A block of zeros has scale 0.
void EncodeCombineRow(RowFormat format, const float* x, int64_t dim, uint8_t* out);
void DecodeCombineRow(RowFormat format, const uint8_t* bytes, int64_t dim, float* x);

}  // namespace ternion::comm
