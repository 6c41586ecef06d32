// What a rank's memory holds once its model is loaded, for a table and for JSON.
#pragma once

#include "absl/status/statusor.h"
#include "launcher/report.h"
#include "launcher/world.h"
#include "runtime/engine.h"

namespace ternion::launcher {

// Collective. On rank 0: an object for each rank (docs/json.md, `memory`); elsewhere empty. The
// memory is what ops work in: a device's, or a rank's share of the host's.
absl::StatusOr<Json> CollectMemory(const runtime::Engine& engine, World& world);

// Prints the rank of CollectMemory's that has least left.
void PrintMemory(const Json& memory);

}  // namespace ternion::launcher
