#include "comm/traffic.h"

namespace ternion::comm {

TrafficCount& TrafficCount::operator+=(const TrafficCount& other) {
  payload_bytes += other.payload_bytes;
  message_bytes += other.message_bytes;
  messages += other.messages;
  rows += other.rows;
  return *this;
}

void TrafficMeter::Add(Direction direction, Phase phase, base::RankId peer,
                       const TrafficCount& count) {
  const size_t index = base::Index(peer);
  if (counts_.size() <= index) counts_.resize(index + 1);
  counts_[index][static_cast<int>(direction)][static_cast<int>(phase)] += count;
}

TrafficCount TrafficMeter::at(Direction direction, Phase phase, base::RankId peer) const {
  const size_t index = base::Index(peer);
  if (counts_.size() <= index) return {};
  return counts_[index][static_cast<int>(direction)][static_cast<int>(phase)];
}

void TrafficMeter::RowsLeave(Clock::time_point now) {
  if (exchanges_under_way_++ == 0) left_at_ = now;
}

void TrafficMeter::RowsArrived(Clock::time_point now) {
  if (--exchanges_under_way_ > 0) return;
  wire_seconds_ += std::chrono::duration<double>(now - left_at_).count();
}

void TrafficMeter::Reset() {
  counts_.assign(counts_.size(), {});
  wire_seconds_ = 0;
  wait_seconds_ = 0;
}

}  // namespace ternion::comm
