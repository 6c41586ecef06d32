// Small collectives for control traffic (plans, results, errors), on top of Transport.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "comm/transport.h"

namespace ternion::comm {

// Rank 0's `bytes` on every rank.
absl::StatusOr<std::string> Broadcast(Transport& transport, const std::string& bytes);

// On rank 0: every rank's `bytes`, by rank. Elsewhere: empty.
absl::StatusOr<std::vector<std::string>> Gather(Transport& transport, const std::string& bytes);

// The same outcome everywhere: ok when every rank passes ok, else the error of the lowest rank that
// has one. What only one rank can find (a corrupt shard) ends all of them with one message and no
// hang.
absl::Status AgreeOnStatus(Transport& transport, const absl::Status& status);

// Ok when every rank passes the same `value`, else InvalidArgument on all: "rank 2 has another
// `what` than rank 0". For what each rank reads or makes by itself and all must have alike.
absl::Status AgreeOnValue(Transport& transport, absl::string_view what, uint64_t value);

// Rank 0's `status` on every rank, for what only rank 0 looks at.
absl::Status BroadcastStatus(Transport& transport, const absl::Status& status);

// Whether `status` is an error that one of the two above returned: every rank has it, so one of
// them may report it and all may leave in peace.
bool IsAgreed(const absl::Status& status);

}  // namespace ternion::comm
