#include "comm/all_to_all.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "comm/wire.h"

namespace ternion::comm {

AllToAllTransport::AllToAllTransport(Transport* inner)
    : Transport(std::make_shared<MessagePool>()), inner_(*inner), outgoing_(inner->size()) {}

absl::Status AllToAllTransport::Send(RankId to, Phase, Message message) {
  TERNION_CHECK(outgoing_[base::Index(to)].size_bytes == 0);
  outgoing_[base::Index(to)] = std::move(message);
  return absl::OkStatus();
}

absl::Status AllToAllTransport::Flush() {
  TERNION_ASSIGN_OR_RETURN(std::vector<Message> incoming, inner_.AllToAllV(std::move(outgoing_)));
  outgoing_.clear();
  outgoing_.resize(size());
  for (int rank = 0; rank < size(); ++rank) {
    if (incoming[rank].size_bytes <= offsetof(MessageHeader, phase)) continue;
    // A hint only: whoever reads the message checks it.
    const Phase phase{incoming[rank].bytes()[offsetof(MessageHeader, phase)]};
    arrived_.push_back({{RankId{rank}, phase}, std::move(incoming[rank])});
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<Arrival>> AllToAllTransport::TryReceive(
    std::span<const Awaited> awaited) {
  const auto found = std::find_if(arrived_.begin(), arrived_.end(), [&](const Arrival& arrival) {
    return std::find(awaited.begin(), awaited.end(), arrival.what) != awaited.end();
  });
  if (found == arrived_.end()) return std::optional<Arrival>();
  std::optional<Arrival> arrival(std::move(*found));
  arrived_.erase(found);
  return arrival;
}

absl::StatusOr<Arrival> AllToAllTransport::Receive(std::span<const Awaited> awaited) {
  TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival, TryReceive(awaited));
  if (arrival) return *std::move(arrival);
  return absl::UnavailableError(
      absl::StrCat("rank ", base::Index(awaited.front().from), " sent nothing"));
}

}  // namespace ternion::comm
