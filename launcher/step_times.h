// A step of the engine and where its time went.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "launcher/report.h"
#include "runtime/engine.h"

namespace ternion::launcher {

// Where the time of some steps went, on rank 0, in seconds.
struct StepTimes {
  double total = 0;
  double wait = 0;  // for messages, with nothing else to do
  double wire = 0;  // rows were under way
  int64_t steps = 0;
  int64_t steps_in_two = 0;  // of them, in two micro-batches

  StepTimes& operator+=(const StepTimes& other);
  // Milliseconds per step (docs/json.md, prefill_time).
  Json ToJson() const;
};

struct TimedStep {
  runtime::StepReport report;
  StepTimes times;
};

// Rank 0: Engine::Step, timed.
absl::StatusOr<TimedStep> StepTimed(runtime::Engine& engine);

}  // namespace ternion::launcher
