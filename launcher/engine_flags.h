// The flags that run, eval and the benches share, and the engine they describe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "launcher/world.h"
#include "runtime/engine.h"

namespace ternion::launcher {

struct EngineFlags {
  WorldOptions world;
  std::string model;
  std::string wire_dispatch = "auto";
  std::string wire_combine = "bf16";
  std::string wire;  // "exact" or empty
  std::string placement = "contiguous";
  std::string trace;
  std::string kv = "auto";
  int64_t kv_tokens = 0;
  std::string exchange = "direct";
  std::string micro_batches = "auto";
};

// Adds --threads, --device and --transport to `command`.
void AddWorldFlags(CLI::App& command, WorldOptions& options);
// Adds --model, --wire*, --placement, --trace, --exchange, --micro-batches, --kv, --kv-tokens and
// the world's flags.
void AddEngineFlags(CLI::App& command, EngineFlags& flags);

// An engine and how long it took to load.
struct LoadedEngine {
  std::unique_ptr<runtime::Engine> engine;
  double load_seconds = 0;
};

// Collective. Shows a progress bar on rank 0. `kernels`: in place of the world's, with the same
// layouts; outlives the engine.
absl::StatusOr<LoadedEngine> LoadEngine(const EngineFlags& flags, World& world,
                                        bool hash_logits = false,
                                        const kernels::Kernels* kernels = nullptr);

// The wire as flags say: dispatch "auto" is left to the model. InvalidArgument for contradictions.
absl::StatusOr<runtime::WireOptions> ResolveWire(const EngineFlags& flags);

}  // namespace ternion::launcher
