// What ranks tell each other before a round of the NCCL transport (nccl.cc), byte by byte:
//
//   header | Announced messages[header.rows]
//
// The header is a control message's; its step is the round, routes is 1 when the sender takes part
// in no later one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/transport.h"

namespace ternion::comm {

// As MPI's, so that a model that runs over one runs over the other.
inline constexpr uint64_t kMaxNcclMessageBytes = INT32_MAX;

// A message that its sender has for the reader in this round.
struct Announced {
  uint64_t size_bytes = 0;
  uint64_t phase = 0;

  friend bool operator==(const Announced&, const Announced&) = default;
};

struct Join {
  uint32_t round = 0;
  bool leaving = false;
  std::vector<Announced> messages;  // in the order in which they travel
};

size_t JoinBytes(const Join& join);

// Fills `message` of JoinBytes.
void WriteJoin(const Join& join, std::span<uint8_t> message);

// Checks all of what `from` sent to enter `round`. Errors name it.
absl::StatusOr<Join> ReadJoin(std::span<const uint8_t> message, uint32_t round, RankId from);

}  // namespace ternion::comm
