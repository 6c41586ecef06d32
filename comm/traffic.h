// Counts what a rank sends and receives, at two byte levels that are never mixed, by peer; and how
// long it took.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/ids.h"

namespace ternion::comm {

// What a message is for. Control carries step plans and results, never activations.
enum class Phase : uint8_t { kControl, kDispatch, kCombine };
inline constexpr int kNumPhases = 3;

enum class Direction : uint8_t { kSent, kReceived };
inline constexpr int kNumDirections = 2;

// Self rows stay in this rank's memory: their payload is counted (as sent to itself), but they are
// never wire traffic and form no message.
enum class TrafficScope : uint8_t { kSelf, kIntraNode, kInterNode };

struct TrafficCount {
  int64_t payload_bytes = 0;  // codes and scales
  int64_t message_bytes = 0;  // payload, header, ids and gate weights
  int64_t messages = 0;
  int64_t rows = 0;

  TrafficCount& operator+=(const TrafficCount& other);
};

// Plain counters of one rank; not shared between threads.
class TrafficMeter {
 public:
  void Add(Direction direction, Phase phase, base::RankId peer, const TrafficCount& count);
  // Of one peer; zeros for a rank that was never counted.
  TrafficCount at(Direction direction, Phase phase, base::RankId peer) const;

  // Seconds that messages of `phase` were under way: from when this rank had sent its own until
  // the last of the peers' was there.
  void AddWire(Phase phase, double seconds) { wire_seconds_[static_cast<int>(phase)] += seconds; }
  double wire_seconds(Phase phase) const { return wire_seconds_[static_cast<int>(phase)]; }
  // Seconds in which this rank had nothing to do but wait for messages, control among them.
  void AddWait(double seconds) { wait_seconds_ += seconds; }
  double wait_seconds() const { return wait_seconds_; }

  void Reset();

 private:
  using Counts = std::array<std::array<TrafficCount, kNumPhases>, kNumDirections>;

  std::vector<Counts> counts_;  // [peer]
  std::array<double, kNumPhases> wire_seconds_{};
  double wait_seconds_ = 0;
};

}  // namespace ternion::comm
