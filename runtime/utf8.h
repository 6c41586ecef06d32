// UTF-8 from outside: checked, decoded, encoded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace ternion::runtime {

bool IsValidUtf8(absl::string_view bytes);

// Appends `bytes` to `*text` with each maximal invalid part (Unicode, table 3-8; what Python's
// errors="replace" does) replaced by U+FFFD. Returns how many bytes were consumed: all of them if
// `is_last`, else all but an unfinished character at the end.
size_t AppendAsUtf8(absl::string_view bytes, bool is_last, std::string* text);

// Code points of valid UTF-8.
std::vector<int32_t> DecodeUtf8(absl::string_view text);
void AppendCodePoint(int32_t code_point, std::string* text);

// `text` (valid UTF-8) in Unicode normalization form C.
std::string ToNfc(absl::string_view text);

}  // namespace ternion::runtime
