#include "comm/nccl/join.h"

#include <algorithm>

#include "base/status.h"
#include "comm/wire.h"

namespace ternion::comm {
namespace {

MessageHeader HeaderOf(uint32_t round) {
  MessageHeader header;
  header.phase = Phase::kControl;
  header.step = round;
  return header;
}

absl::Status CheckAnnounced(const Announced& message) {
  const bool travels = message.phase == static_cast<uint64_t>(Phase::kDispatch) ||
                       message.phase == static_cast<uint64_t>(Phase::kCombine);
  if (!travels) {
    return absl::InvalidArgumentError(absl::StrCat("a message of phase ", message.phase));
  }
  if (message.size_bytes > kMaxNcclMessageBytes) {
    return absl::InvalidArgumentError(absl::StrCat("a message of ", message.size_bytes, " bytes"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Join> Read(std::span<const uint8_t> message, uint32_t round, RankId from) {
  TERNION_ASSIGN_OR_RETURN(const MessageHeader header, CheckHeader(message, HeaderOf(round), from));
  const std::span<const uint8_t> list = message.subspan(sizeof(header));
  if (header.payload_bytes != list.size() || list.size() != header.rows * sizeof(Announced)) {
    return absl::InvalidArgumentError(
        absl::StrCat(list.size(), " bytes for ", header.rows, " messages"));
  }
  if (header.routes > 1) return absl::InvalidArgumentError("neither stays nor leaves");
  Join join{.round = round, .leaving = header.routes == 1, .messages = {}};
  join.messages.resize(header.rows);
  std::copy(list.begin(), list.end(), reinterpret_cast<uint8_t*>(join.messages.data()));
  for (const Announced& announced : join.messages) {
    TERNION_RETURN_IF_ERROR(CheckAnnounced(announced));
  }
  return join;
}

}  // namespace

size_t JoinBytes(const Join& join) {
  return sizeof(MessageHeader) + join.messages.size() * sizeof(Announced);
}

void WriteJoin(const Join& join, std::span<uint8_t> message) {
  MessageHeader header = HeaderOf(join.round);
  header.rows = static_cast<uint32_t>(join.messages.size());
  header.routes = join.leaving;
  header.payload_bytes = message.size() - sizeof(header);
  const auto* list = reinterpret_cast<const uint8_t*>(join.messages.data());
  std::copy_n(list, header.payload_bytes, message.data() + sizeof(header));
  SealMessage(header, message);
}

absl::StatusOr<Join> ReadJoin(std::span<const uint8_t> message, uint32_t round, RankId from) {
  absl::StatusOr<Join> join = Read(message, round, from);
  if (join.ok()) return join;
  return base::Annotate(
      join.status(), absl::StrCat("what rank ", base::Index(from), " announced for round ", round));
}

}  // namespace ternion::comm
