#include "comm/codec.h"

#include "absl/strings/str_cat.h"

namespace ternion::comm {

absl::string_view RowFormatName(RowFormat format) {
  constexpr const char* kNames[] = {"fp32", "bf16", "int8", "int4"};
  return kNames[static_cast<int>(format)];
}

absl::StatusOr<RowFormat> ParseRowFormat(absl::string_view name) {
  for (RowFormat format :
       {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8, RowFormat::kInt4}) {
    if (name == RowFormatName(format)) return format;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown row format '", name, "'; choose fp32, bf16, int8 or int4"));
}

}  // namespace ternion::comm
