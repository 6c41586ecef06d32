// `eval --ladder`: what every precision of the wire and of the KV cache costs in quality.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "launcher/commands.h"
#include "launcher/world.h"

namespace ternion::launcher {

// What a rank may keep of the reference's logits, about: windows are compared in groups that fit.
inline constexpr int64_t kLadderReferenceBytes = int64_t{512} << 20;

// Scores options.text with the exact wire and the model's own KV cache, then with the dispatches,
// combines and caches that make sense, over the same weights and ranks, and compares row by row.
// Prints a table; docs/json.md describes options.json. Collective. InvalidArgument when logits are
// not finite.
absl::Status EvalLadder(const EvalOptions& options, World& world,
                        int64_t reference_bytes = kLadderReferenceBytes);

}  // namespace ternion::launcher
