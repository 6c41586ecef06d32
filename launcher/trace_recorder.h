// Records which experts a text's tokens take, for `ternion eval --record-trace`.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/transport.h"
#include "experts/trace.h"
#include "runtime/engine.h"

namespace ternion::launcher {

// One per rank, from before the first step until after the last.
class TraceRecorder {
 public:
  // Listens to `engine`, which outlives it.
  explicit TraceRecorder(runtime::Engine& engine);
  ~TraceRecorder() { engine_.set_routing_sink(nullptr); }
  TraceRecorder(const TraceRecorder&) = delete;
  TraceRecorder& operator=(const TraceRecorder&) = delete;

  // Collective. On rank 0: all ranks' rows by (sequence, position), but for the first position of
  // every sequence after the first, which is the last one of the window before (CutText).
  // Elsewhere: empty. InvalidArgument when there is no row.
  absl::StatusOr<experts::RoutingTrace> Gather(comm::Transport& transport);

 private:
  struct Row {
    int32_t sequence = 0;
    int32_t position = 0;
    bool operator<(const Row& other) const {
      return std::pair(sequence, position) < std::pair(other.sequence, other.position);
    }
  };

  std::string Serialize() const;
  absl::Status AddRowsOf(const std::string& bytes);

  runtime::Engine& engine_;
  // [layers with experts, top_k], as the gate ordered them
  std::map<Row, std::vector<uint16_t>> rows_;
};

}  // namespace ternion::launcher
