// Names of the precisions at which rows travel (kernels/row_codec.h).
//
// Dispatch holds the codes that the experts will multiply, with one fp32 scale per row, at the
// model's own width (int8 for 8-bit activations, int4 for 4-bit): nothing is rounded. At fp32 and
// bf16 it holds the rows themselves. Combine holds encoded rows: they are rounded, but at fp32.
#pragma once

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/row_codec.h"

namespace ternion::comm {

using kernels::RowFormat;

absl::string_view RowFormatName(RowFormat format);  // "fp32", ...
absl::StatusOr<RowFormat> ParseRowFormat(
    absl::string_view name);  // InvalidArgument names the choices

}  // namespace ternion::comm
