// Counts what a rank sends and receives, at two byte levels that are never mixed, by peer; and how
// long it took.
#pragma once

#include <array>
#include <chrono>
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

  // Rows are under way: from when this rank has sent its own until it has taken in the last of the
  // peers'. Of exchanges that overlap, the time counts once.
  using Clock = std::chrono::steady_clock;
  void RowsLeave(Clock::time_point now = Clock::now());
  void RowsArrived(Clock::time_point now = Clock::now());
  double wire_seconds() const { return wire_seconds_; }
  // Seconds in which this rank had nothing to do but wait for messages, control among them.
  void AddWait(double seconds) { wait_seconds_ += seconds; }
  double wait_seconds() const { return wait_seconds_; }

  // While nothing is under way.
  void Reset();

 private:
  using Counts = std::array<std::array<TrafficCount, kNumPhases>, kNumDirections>;

  std::vector<Counts> counts_;  // [peer]
  int exchanges_under_way_ = 0;
  Clock::time_point left_at_;  // when the first of these did
  double wire_seconds_ = 0;
  double wait_seconds_ = 0;
};

}  // namespace ternion::comm
