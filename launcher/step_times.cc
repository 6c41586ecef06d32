#include "launcher/step_times.h"

#include <chrono>

#include "base/status.h"

namespace ternion::launcher {

StepTimes& StepTimes::operator+=(const StepTimes& other) {
  total += other.total;
  wait += other.wait;
  wire += other.wire;
  steps += other.steps;
  steps_in_two += other.steps_in_two;
  return *this;
}

Json StepTimes::ToJson() const {
  const double scale = steps > 0 ? 1e3 / static_cast<double>(steps) : 0;
  return {{"steps", steps},           {"steps_in_two", steps_in_two},
          {"step_ms", total * scale}, {"compute_ms", (total - wait) * scale},
          {"wire_ms", wire * scale},  {"wait_ms", wait * scale}};
}

absl::StatusOr<TimedStep> StepTimed(runtime::Engine& engine) {
  using Clock = std::chrono::steady_clock;
  const comm::TrafficMeter& meter = engine.traffic();
  const double wait_before = meter.wait_seconds(), wire_before = meter.wire_seconds();
  const Clock::time_point start = Clock::now();
  TimedStep step;
  TERNION_ASSIGN_OR_RETURN(step.report, engine.Step());
  step.times = {.total = std::chrono::duration<double>(Clock::now() - start).count(),
                .wait = meter.wait_seconds() - wait_before,
                .wire = meter.wire_seconds() - wire_before,
                .steps = 1,
                .steps_in_two = step.report.micro_batches == 2};
  return step;
}

}  // namespace ternion::launcher
