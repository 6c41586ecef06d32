// For comparison: an exchange by MPI_Ialltoallv, as most systems do it.
#pragma once

#include <optional>
#include <vector>

#include "comm/transport.h"

namespace ternion::comm {

// Keeps what is sent until Flush, which is collective and moves all of it at once: first the sizes,
// then the bytes (Transport::AllToAllV). Receive hands out what came. One message to a peer between
// two flushes. `inner` outlives it and counts the traffic; nobody else uses it meanwhile.
class AllToAllTransport : public Transport {
 public:
  explicit AllToAllTransport(Transport* inner);

  RankId rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  int NodeOf(RankId rank) const override { return inner_.NodeOf(rank); }

  absl::Status Send(RankId to, Phase phase, Message message) override;
  absl::Status Flush() override;
  // Unavailable when nothing of `awaited` came with the last Flush.
  absl::StatusOr<Arrival> Receive(std::span<const Awaited> awaited) override;
  absl::StatusOr<std::optional<Arrival>> TryReceive(std::span<const Awaited> awaited) override;
  void Abort(const absl::Status& status) override { inner_.Abort(status); }

 private:
  Transport& inner_;
  std::vector<Message> outgoing_;  // [rank] no bytes: nothing for it
  std::vector<Arrival> arrived_;
};

}  // namespace ternion::comm
