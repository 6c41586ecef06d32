#include "launcher/memory_speed.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/status.h"
#include "comm/collective.h"
#include "comm/finish.h"
#include "kernels/cpu/limits.h"
#include "kernels/cuda/limits.h"

namespace ternion::launcher {
namespace {

constexpr int kAttempts = 5;
constexpr int64_t kMostBytes = int64_t{1} << 30;
constexpr int64_t kLeastBytes = int64_t{64} << 20;  // of a rank: more than its part of a cache

// Returns about when all ranks do.
absl::Status Meet(World& world) { return comm::AgreeOnStatus(world.transport(), absl::OkStatus()); }

// Pages that were written, or all of them would be the same one.
base::Buffer WrittenMemory(World& world) {
  const int64_t free_bytes = sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
  const int64_t of_node = std::min(kMostBytes, free_bytes / 4);
  base::Buffer memory(std::max(of_node / world.transport().ranks_of_node(), kLeastBytes));
  base::ThreadPool& threads = *world.resources().executor->threads;
  threads.ParallelFor(memory.size(), 1, [&](int64_t begin, int64_t end, int) {
    std::memset(memory.data() + begin, 1, end - begin);
  });
  return memory;
}

absl::StatusOr<double> MeasureDevice(World& world) {
  TERNION_RETURN_IF_ERROR(Meet(world));
  kernels::Executor& executor = *world.resources().executor;
  const double speed = kernels::DeviceCopyBandwidth(executor);
  TERNION_RETURN_IF_ERROR(comm::Finish(world.kernels(), executor));
  return speed;
}

}  // namespace

MemorySpeed::MemorySpeed(World& world)
    : world_(world),
      on_device_(world.resources().executor->memory != world.resources().executor->staging),
      of_device_(on_device_ ? MeasureDevice(world) : 0.0) {}

absl::StatusOr<double> MemorySpeed::Measure() { return on_device_ ? of_device_ : MeasureHost(); }

absl::StatusOr<double> MemorySpeed::MeasureHost() {
  if (read_.size() == 0) read_ = WrittenMemory(world_);
  double most = 0;
  for (int i = 0; i < kAttempts; ++i) {
    TERNION_RETURN_IF_ERROR(Meet(world_));
    base::ThreadPool& threads = *world_.resources().executor->threads;
    most = std::max(most, kernels::ReadBandwidth({read_.data(), read_.size()}, threads));
  }
  return most;
}

}  // namespace ternion::launcher
