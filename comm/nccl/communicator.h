// An NCCL communicator whose calls never block: the caller polls, and can give up.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace ternion::comm {

// The device this thread has chosen, the same text for every rank of a host that uses it.
// Unimplemented in a build without NCCL.
absl::StatusOr<std::string> DeviceName();

// What rank 0 makes and all ranks of a communicator pass to Connect.
absl::StatusOr<std::string> MakeCommunicatorId();

// Bytes of this rank that go to a peer, or a peer's that come.
struct Move {
  int peer = 0;
  bool incoming = false;
  uint8_t* data = nullptr;  // device memory, or the host's that the device reaches
  uint64_t bytes = 0;       // > 0, the same on both sides
};

// Used by one thread. After an error it is only good for being destroyed.
class Communicator {
 public:
  // Starts connecting this rank, on the device that this thread has chosen, to the size - 1 others.
  static absl::StatusOr<std::unique_ptr<Communicator>> Connect(const std::string& id, int rank,
                                                               int size);
  // Gives up what is under way (ncclCommAbort), unless closed.
  virtual ~Communicator() = default;

  // Starts all `moves` at once, as one group on a stream of its own; between two ranks they are
  // paired in order. Nothing may be under way. The bytes must stay until Poll says that all are
  // done.
  virtual absl::Status Start(std::span<const Move> moves) = 0;

  // Whether nothing is under way: connected, and all moves done. Or what went wrong, here or at a
  // peer, as far as NCCL knows (ncclCommGetAsyncError).
  virtual absl::StatusOr<bool> Poll() = 0;

  // Starts the end: from when Poll says that it is done, nothing of this rank's is on its way any
  // more. Nothing else may follow.
  virtual absl::Status Close() = 0;
};

}  // namespace ternion::comm
