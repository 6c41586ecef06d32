#include "comm/transport.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ternion::comm {
namespace {

constexpr size_t kSmallestBufferBytes = 4096;

}  // namespace

Message MessagePool::Acquire(size_t bytes) {
  const size_t capacity = std::bit_ceil(std::max(bytes, kSmallestBufferBytes));
  base::Memory* memory = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    memory = memory_;
    std::vector<base::Buffer>& free = free_[std::countr_zero(capacity)];
    if (!free.empty()) {
      Message message{std::move(free.back()), bytes};
      free.pop_back();
      return message;
    }
  }
  return Message{base::Buffer(capacity, *memory), bytes};
}

void MessagePool::UseMemory(base::Memory& memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (memory_ == &memory) return;
  memory_ = &memory;
  for (std::vector<base::Buffer>& free : free_) free.clear();
}

void MessagePool::Recycle(Message message) {
  if (message.memory.size() == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (message.memory.memory() != memory_) return;  // it was under way during UseMemory
  free_[std::countr_zero(message.memory.size())].push_back(std::move(message.memory));
}

absl::StatusOr<Arrival> Transport::Receive(std::span<const RankId> from, Phase phase) {
  std::vector<Awaited> awaited;
  for (RankId rank : from) awaited.push_back({rank, phase});
  return Receive(awaited);
}

absl::StatusOr<std::vector<Message>> Transport::AllToAllV(std::vector<Message> to_ranks) {
  for (int rank = 0; rank < size(); ++rank) {
    if (RankId{rank} == this->rank()) continue;
    Message count = Acquire(sizeof(uint64_t));
    const uint64_t bytes = to_ranks[rank].size_bytes;
    std::memcpy(count.bytes().data(), &bytes, sizeof(bytes));
    TERNION_RETURN_IF_ERROR(Send(RankId{rank}, Phase::kControl, std::move(count)));
    if (bytes == 0) continue;
    TERNION_RETURN_IF_ERROR(Send(RankId{rank}, Phase::kControl, std::move(to_ranks[rank])));
  }
  std::vector<Message> from_ranks(size());
  for (int rank = 0; rank < size(); ++rank) {
    const RankId from{rank};
    if (from == this->rank()) continue;
    TERNION_ASSIGN_OR_RETURN(Arrival count, Receive({&from, 1}, Phase::kControl));
    uint64_t bytes = 0;
    if (count.message.size_bytes != sizeof(bytes)) {
      return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " sent a broken size"));
    }
    std::memcpy(&bytes, count.message.bytes().data(), sizeof(bytes));
    Recycle(std::move(count.message));
    if (bytes == 0) continue;
    TERNION_ASSIGN_OR_RETURN(Arrival arrival, Receive({&from, 1}, Phase::kControl));
    from_ranks[rank] = std::move(arrival.message);
  }
  return from_ranks;
}

int Transport::ranks_of_node() const {
  int count = 0;
  for (int other = 0; other < size(); ++other) count += NodeOf(RankId{other}) == NodeOf(rank());
  return count;
}

TrafficScope Transport::ScopeOf(RankId peer) const {
  if (peer == rank()) return TrafficScope::kSelf;
  return NodeOf(peer) == NodeOf(rank()) ? TrafficScope::kIntraNode : TrafficScope::kInterNode;
}

TrafficCount Transport::Traffic(Direction direction, Phase phase, TrafficScope scope) const {
  TrafficCount sum;
  for (int rank = 0; rank < size(); ++rank) {
    if (ScopeOf(RankId{rank}) == scope) sum += traffic_.at(direction, phase, RankId{rank});
  }
  return sum;
}

TrafficCount Transport::WireTraffic(Direction direction, Phase phase) const {
  TrafficCount sum = Traffic(direction, phase, TrafficScope::kIntraNode);
  return sum += Traffic(direction, phase, TrafficScope::kInterNode);
}

}  // namespace ternion::comm
