// `ternion bench decode`: tokens per second of whole steps, beside what memory allows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launcher/engine_flags.h"
#include "launcher/world.h"

namespace ternion::launcher {

struct BenchDecodeOptions {
  EngineFlags engine;
  std::vector<int64_t> batches = {1};  // sequences that generate together, on all ranks
  int64_t prompt_tokens = 16;
  int64_t tokens = 64;  // timed, of each sequence
  uint64_t seed = 0;    // of the prompts; tokens are greedy
  std::string json;
};

// Collective. Loads the model once, prints what memory holds, then a line for each batch; writes
// all of it as JSON (docs/json.md). InvalidArgument, before any step: no batch, more tokens than
// the model has positions, more than the KV cache or a step holds, a report that cannot be written;
// and what Engine::Create returns.
absl::Status BenchDecode(const BenchDecodeOptions& options, World& world);

}  // namespace ternion::launcher
