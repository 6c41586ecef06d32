// Characters that are newer than the Unicode tables of PCRE2.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace ternion::runtime {

// Characters of `property`, a general category ("L", "Lu") or "Han", that came with
// Unicode 15.0, 15.1 and 16.0, as content of a character class in PCRE2 syntax. HF tokenizers knows
// them; PCRE2 10.42 stops at Unicode 14. A later PCRE2 needs them no more, nor do they harm it.
std::string NewerMembers(absl::string_view property);

}  // namespace ternion::runtime
