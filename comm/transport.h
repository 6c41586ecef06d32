// Moves messages between ranks: one message per (peer, phase) at a time, in order.
//
// Backends: loopback (ranks are threads of one process), MPI, NCCL. An absent backend is a stub
// that says so. A Transport belongs to its rank worker and is used by that one thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/buffer.h"
#include "base/ids.h"
#include "comm/traffic.h"

namespace ternion::comm {

using base::RankId;

// Owned bytes of one message. Buffers circulate: Acquire, fill, Send; Receive, read, Recycle. In
// steady state nothing is allocated.
struct Message {
  base::Buffer memory;
  size_t size_bytes = 0;  // used part of memory

  std::span<uint8_t> bytes() { return {memory.data(), size_bytes}; }
  std::span<const uint8_t> bytes() const { return {memory.data(), size_bytes}; }
};

// Free message buffers, by power of two. Thread-safe, since the ranks of a loopback world share
// one.
class MessagePool {
 public:
  Message Acquire(size_t bytes);
  void Recycle(Message message);
  void UseMemory(base::Memory& memory);

 private:
  std::mutex mutex_;
  base::Memory* memory_ = &base::HostMemory();
  std::array<std::vector<base::Buffer>, 64> free_;  // [log2 of the buffers' size]
};

// A message that is to come.
struct Awaited {
  RankId from{};
  Phase phase{};

  friend bool operator==(const Awaited&, const Awaited&) = default;
};

struct Arrival {
  Awaited what;
  Message message;
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual RankId rank() const = 0;
  virtual int size() const = 0;
  // A number per host: ranks with equal numbers share memory.
  virtual int NodeOf(RankId rank) const = 0;
  // Ranks of this one's host, itself included.
  int ranks_of_node() const;

  // Starts sending and returns at once; the buffer comes back to the pool when the bytes have left.
  // `to` is never this rank. Messages to one peer in one phase arrive in the order they were sent.
  // Unavailable when the peer is known to be gone.
  virtual absl::Status Send(RankId to, Phase phase, Message message) = 0;

  // Returns when the bytes of every send have left. Called before this rank computes for long: MPI
  // over TCP moves larger messages only inside its calls, and a peer would wait for them all that
  // time.
  virtual absl::Status Flush() { return absl::OkStatus(); }

  // Waits for the next message of any of `awaited` (not empty, none of this rank); the first to
  // arrive is returned. Idle waiting yields the core. Unavailable, naming the rank, when a peer
  // among them is gone and nothing of it is left to read.
  virtual absl::StatusOr<Arrival> Receive(std::span<const Awaited> awaited) = 0;

  // The same without waiting: none when none of them has arrived. Moves messages under way, so a
  // rank that computes while it exchanges calls this now and then.
  virtual absl::StatusOr<std::optional<Arrival>> TryReceive(std::span<const Awaited> awaited) = 0;

  // Unavailable, naming the rank, when a peer is known to be lost, whoever waits for it. For who
  // waits for something else than messages; not between every two polls, since it may ask the
  // system.
  virtual absl::Status CheckPeers() { return absl::OkStatus(); }

  // Receive for one phase; for control traffic, since it allocates.
  absl::StatusOr<Arrival> Receive(std::span<const RankId> from, Phase phase);

  // Collective: to_ranks[r] goes to rank r, and what rank r sent here is element r of the result;
  // no bytes where there is nothing. Sizes travel first, since no rank knows what it will get.
  virtual absl::StatusOr<std::vector<Message>> AllToAllV(std::vector<Message> to_ranks);

  // Tells the peers that this rank gives up because of `status`: their waits end with an error.
  // Called once, at the end of a rank that failed, which has reported `status` itself. Over MPI it
  // ends the whole job and does not return.
  virtual void Abort(const absl::Status& status) = 0;

  // A message of `bytes` from the pool. Its content is unspecified.
  Message Acquire(size_t bytes) { return pool_->Acquire(bytes); }
  void Recycle(Message message) { pool_->Recycle(std::move(message)); }

  // Messages lie in `memory` from now on, which the host reaches.
  void UseMemory(base::Memory& memory) { pool_->UseMemory(memory); }

  TrafficMeter& traffic() { return traffic_; }
  TrafficScope ScopeOf(RankId peer) const;
  // What went to (came from) the ranks of one scope.
  TrafficCount Traffic(Direction direction, Phase phase, TrafficScope scope) const;
  // Intra-node and inter-node together: what crosses between ranks.
  TrafficCount WireTraffic(Direction direction, Phase phase) const;

 protected:
  explicit Transport(std::shared_ptr<MessagePool> pool) : pool_(std::move(pool)) {}
  // A transport on top of `inner`, to which it hands messages: they share one pool.
  explicit Transport(Transport* inner) : pool_(inner->pool_) {}

 private:
  std::shared_ptr<MessagePool> pool_;
  TrafficMeter traffic_;
};

}  // namespace ternion::comm
