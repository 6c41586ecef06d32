#include "runtime/micro_batches.h"

#include <algorithm>
#include <bit>

namespace ternion::runtime {

// The first step of a way also grows buffers, so it counts for nothing after the second.
void MicroBatchChooser::Way::Add(double new_seconds, double new_wait_share) {
  steps = std::min(steps + 1, kTrials);
  const double weight = steps <= 2 ? 1 : 0.5;
  seconds += weight * (new_seconds - seconds);
  wait_share += weight * (new_wait_share - wait_share);
}

MicroBatchChooser::Size& MicroBatchChooser::SizeOf(int64_t rows) {
  return sizes_[std::bit_width(static_cast<uint64_t>(rows)) % sizes_.size()];
}

int MicroBatchChooser::Choose(int64_t rows) {
  if (rows < kMinRows) return 1;
  Size& size = SizeOf(rows);
  const auto& [one, two] = size.ways;
  if (one.steps < kTrials || one.wait_share < kMinWaitShare) return 1;
  if (two.steps < kTrials) return 2;
  const int faster = two.seconds < one.seconds ? 2 : 1;
  if (++size.steps_since_look < kStepsBetweenLooks) return faster;
  size.steps_since_look = 0;
  return 3 - faster;
}

void MicroBatchChooser::Record(int64_t rows, int micro_batches, double seconds,
                               double wait_seconds) {
  if (rows < kMinRows || seconds <= 0) return;
  const double seconds_per_row = seconds / static_cast<double>(rows);
  SizeOf(rows).ways[micro_batches - 1].Add(seconds_per_row, wait_seconds / seconds);
}

}  // namespace ternion::runtime
