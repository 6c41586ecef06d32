// JSON from outside, parsed without exceptions and without surprises.
#pragma once

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace ternion::runtime {

// One JSON document. InvalidArgument, in one line, for malformed text, a key that occurs twice in
// an object (nlohmann's own parser would silently keep the last), nesting deeper than 64, or more
// than 16 million values.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text);

// The member of object `json`, or null when there is none or `json` is no object.
const nlohmann::json* FindMember(const nlohmann::json& json, const char* key);

}  // namespace ternion::runtime
