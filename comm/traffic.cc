#include "comm/traffic.h"

namespace ternion::comm {
namespace {

void AddTo(const TrafficCount& count, TrafficCount* sum) {
  sum->payload_bytes += count.payload_bytes;
  sum->message_bytes += count.message_bytes;
  sum->messages += count.messages;
  sum->rows += count.rows;
}

}  // namespace

void TrafficMeter::Add(Phase phase, TrafficScope scope, const TrafficCount& count) {
  AddTo(count, &counts_[static_cast<int>(phase)][static_cast<int>(scope)]);
}

const TrafficCount& TrafficMeter::at(Phase phase, TrafficScope scope) const {
  return counts_[static_cast<int>(phase)][static_cast<int>(scope)];
}

TrafficCount TrafficMeter::Wire(Phase phase) const {
  TrafficCount sum = at(phase, TrafficScope::kIntraNode);
  AddTo(at(phase, TrafficScope::kInterNode), &sum);
  return sum;
}

}  // namespace ternion::comm
