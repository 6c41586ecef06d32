#include "comm/collective.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "absl/strings/cord.h"
#include "base/status.h"
#include "comm/wire.h"

namespace ternion::comm {
namespace {

constexpr RankId kRoot{0};

// Marks an error that every rank has.
constexpr char kAgreedPayload[] = "ternion/agreed";

MessageHeader ControlHeader() {
  MessageHeader header;
  header.phase = Phase::kControl;
  return header;
}

absl::Status SendBytes(Transport& transport, RankId to, const std::string& bytes) {
  MessageHeader header = ControlHeader();
  header.payload_bytes = bytes.size();
  Message message = transport.Acquire(sizeof(header) + bytes.size());
  std::memcpy(message.bytes().data() + sizeof(header), bytes.data(), bytes.size());
  SealMessage(header, message.bytes());
  transport.traffic().Add(Direction::kSent, Phase::kControl, to,
                          {.payload_bytes = static_cast<int64_t>(bytes.size()),
                           .message_bytes = static_cast<int64_t>(message.size_bytes),
                           .messages = 1});
  return transport.Send(to, Phase::kControl, std::move(message));
}

absl::StatusOr<Arrival> AwaitControl(Transport& transport, std::span<const RankId> from) {
  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<Arrival> arrival = transport.Receive(from, Phase::kControl);
  transport.traffic().AddWait(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return arrival;
}

// The bytes that the arrival carries; its buffer goes back to the pool.
absl::StatusOr<std::string> OpenArrival(Transport& transport, Arrival arrival) {
  const std::span<const uint8_t> message = arrival.message.bytes();
  TERNION_ASSIGN_OR_RETURN(const MessageHeader header,
                           CheckHeader(message, ControlHeader(), arrival.what.from));
  const std::span<const uint8_t> payload = message.subspan(sizeof(header));
  if (header.payload_bytes != payload.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("control message from rank ", base::Index(arrival.what.from),
                     ": payload bytes is ", header.payload_bytes, ", expected ", payload.size()));
  }
  std::string bytes(payload.begin(), payload.end());
  transport.Recycle(std::move(arrival.message));
  return bytes;
}

std::vector<RankId> OtherRanks(const Transport& transport) {
  std::vector<RankId> others;
  for (int rank = 0; rank < transport.size(); ++rank) {
    if (RankId{rank} != transport.rank()) others.push_back(RankId{rank});
  }
  return others;
}

// One byte of code, then the message.
std::string EncodeStatus(const absl::Status& status) {
  std::string bytes(1, static_cast<char>(status.code()));
  bytes.append(status.message().data(), status.message().size());
  return bytes;
}

absl::Status DecodeStatus(const std::string& bytes) {
  constexpr int kLastCode = static_cast<int>(absl::StatusCode::kUnauthenticated);
  if (bytes.empty() || static_cast<uint8_t>(bytes[0]) > kLastCode) {
    return absl::InvalidArgumentError("control message: unknown status code");
  }
  return absl::Status(static_cast<absl::StatusCode>(bytes[0]), bytes.substr(1));
}

}  // namespace

absl::StatusOr<std::string> Broadcast(Transport& transport, const std::string& bytes) {
  if (transport.rank() != kRoot) {
    TERNION_ASSIGN_OR_RETURN(Arrival arrival, AwaitControl(transport, {&kRoot, 1}));
    return OpenArrival(transport, std::move(arrival));
  }
  for (RankId to : OtherRanks(transport)) {
    TERNION_RETURN_IF_ERROR(SendBytes(transport, to, bytes));
  }
  TERNION_RETURN_IF_ERROR(transport.Flush());
  return bytes;
}

absl::StatusOr<std::vector<std::string>> Gather(Transport& transport, const std::string& bytes) {
  if (transport.rank() != kRoot) {
    TERNION_RETURN_IF_ERROR(SendBytes(transport, kRoot, bytes));
    TERNION_RETURN_IF_ERROR(transport.Flush());
    return std::vector<std::string>();
  }
  std::vector<std::string> gathered(transport.size());
  gathered[0] = bytes;
  std::vector<RankId> waiting = OtherRanks(transport);
  while (!waiting.empty()) {
    TERNION_ASSIGN_OR_RETURN(Arrival arrival, AwaitControl(transport, waiting));
    const RankId from = arrival.what.from;
    std::erase(waiting, from);
    TERNION_ASSIGN_OR_RETURN(gathered[base::Index(from)],
                             OpenArrival(transport, std::move(arrival)));
  }
  return gathered;
}

absl::Status AgreeOnStatus(Transport& transport, const absl::Status& status) {
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> statuses,
                           Gather(transport, EncodeStatus(status)));
  std::string outcome = EncodeStatus(absl::OkStatus());
  for (size_t rank = statuses.size(); rank-- > 0;) {
    const absl::Status of_rank = DecodeStatus(statuses[rank]);
    if (of_rank.ok()) continue;
    // Which rank it is matters only where ranks differ.
    const bool alike = std::count(statuses.begin(), statuses.end(), statuses[rank]) ==
                       static_cast<int64_t>(statuses.size());
    outcome = EncodeStatus(alike ? of_rank : base::Annotate(of_rank, absl::StrCat("rank ", rank)));
  }
  return BroadcastStatus(transport, DecodeStatus(outcome));
}

absl::Status AgreeOnValue(Transport& transport, absl::string_view what, uint64_t value) {
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> values,
                           Gather(transport, absl::StrCat(value)));
  absl::Status status;
  for (size_t rank = 1; rank < values.size(); ++rank) {
    if (values[rank] == values[0]) continue;
    status.Update(absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " has another ", what, " than rank 0")));
  }
  return BroadcastStatus(transport, status);
}

absl::Status BroadcastStatus(Transport& transport, const absl::Status& status) {
  TERNION_ASSIGN_OR_RETURN(const std::string outcome, Broadcast(transport, EncodeStatus(status)));
  absl::Status agreed = DecodeStatus(outcome);
  if (!agreed.ok()) agreed.SetPayload(kAgreedPayload, absl::Cord());
  return agreed;
}

bool IsAgreed(const absl::Status& status) { return status.GetPayload(kAgreedPayload).has_value(); }

}  // namespace ternion::comm
