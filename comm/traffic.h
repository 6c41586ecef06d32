// Counts what a rank sends, at two byte levels that are never mixed, split by where it goes.
#pragma once

#include <array>
#include <cstdint>

namespace ternion::comm {

// What a message is for. Control carries step plans and results, never activations.
enum class Phase : uint8_t { kControl, kDispatch, kCombine };
inline constexpr int kNumPhases = 3;

// Self rows stay in this rank's memory: their payload is counted, but they are never wire traffic
// and form no message.
enum class TrafficScope : uint8_t { kSelf, kIntraNode, kInterNode };
inline constexpr int kNumScopes = 3;

struct TrafficCount {
  int64_t payload_bytes = 0;  // codes and scales
  int64_t message_bytes = 0;  // payload, header, ids and gate weights
  int64_t messages = 0;
  int64_t rows = 0;
};

// Plain counters of one rank; not shared between threads.
class TrafficMeter {
 public:
  void Add(Phase phase, TrafficScope scope, const TrafficCount& count);
  const TrafficCount& at(Phase phase, TrafficScope scope) const;
  // Intra-node and inter-node together: what crosses between ranks.
  TrafficCount Wire(Phase phase) const;
  void Reset() { counts_ = {}; }

 private:
  std::array<std::array<TrafficCount, kNumScopes>, kNumPhases> counts_{};
};

}  // namespace ternion::comm
