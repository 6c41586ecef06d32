// How fast memory gives a rank what its ops read.
#pragma once

#include "absl/status/statusor.h"
#include "base/buffer.h"
#include "launcher/world.h"

namespace ternion::launcher {

// Measures what a rank gets of its machine's memory while all ranks measure: on a CPU, what its
// threads read; on a device, what copying within it moves, reads and writes together.
class MemorySpeed {
 public:
  // Collective, as is Measure. A device is measured here, while it has room for it.
  explicit MemorySpeed(World& world);

  // Bytes per second, the most of some attempts (a device's: as before). Takes a fraction of a
  // second; the first time also 1 GiB of the host's memory, shared by the node's ranks, which then
  // is kept. An error is the transport's, or the device's.
  absl::StatusOr<double> Measure();

 private:
  absl::StatusOr<double> MeasureHost();

  World& world_;
  const bool on_device_;
  absl::StatusOr<double> of_device_;
  base::Buffer read_;
};

}  // namespace ternion::launcher
