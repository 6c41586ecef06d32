// `eval --ladder`: what every precision of the wire and of the KV cache costs in quality.
#pragma once

#include "absl/status/status.h"
#include "launcher/commands.h"
#include "launcher/world.h"

namespace ternion::launcher {

// Scores options.text with the exact wire and the model's own KV cache, then with every other
// precision, over the same weights and ranks, and compares row by row. Prints a table; docs/json.md
// describes options.json. Collective.
absl::Status EvalLadder(const EvalOptions& options, World& world);

}  // namespace ternion::launcher
