#include "comm/wire.h"

#include <isa-l/crc.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "base/checked.h"
#include "base/status.h"

namespace ternion::comm {
namespace {

constexpr const char* kPhaseNames[] = {"control", "dispatch", "combine"};

template <typename T>
T Load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

bool HasScales(RowFormat format) {
  return format == RowFormat::kInt8 || format == RowFormat::kInt4;
}

// Continues a CRC-32C over `bytes`; ISA-L takes lengths as int.
uint32_t ExtendCrc(uint32_t crc, std::span<const uint8_t> bytes) {
  constexpr size_t kChunk = size_t{1} << 30;
  while (!bytes.empty()) {
    const std::span<const uint8_t> chunk = bytes.first(std::min(bytes.size(), kChunk));
    // The function only reads, though its parameter is not const.
    crc = crc32_iscsi(const_cast<uint8_t*>(chunk.data()), static_cast<int>(chunk.size()), crc);
    bytes = bytes.subspan(chunk.size());
  }
  return crc;
}

uint32_t MessageCrc(MessageHeader header, std::span<const uint8_t> message) {
  header.crc32c = 0;
  const uint8_t* start = reinterpret_cast<const uint8_t*>(&header);
  return ~ExtendCrc(ExtendCrc(~0u, {start, sizeof(header)}), message.subspan(sizeof(header)));
}

// Whose message is being read. Texts are made only when there is something to say.
struct Origin {
  Phase phase;
  RankId from;

  std::string Name() const {
    return absl::StrCat(kPhaseNames[static_cast<int>(phase)], " message from rank ",
                        base::Index(from));
  }
};

absl::Status CheckField(const Origin& origin, const char* field, uint64_t value,
                        uint64_t expected) {
  if (value == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(origin.Name(), ": ", field, " is ", value, ", expected ", expected));
}

absl::Status CheckRange(const Origin& origin, const char* field, uint64_t value, uint64_t least,
                        uint64_t most) {
  if (least <= value && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(origin.Name(), ": ", field, " is ", value, ", expected ", least, " to ", most));
}

// Route counts and expert ids of every row.
absl::Status CheckRoutes(const Origin& origin, const DispatchView& view,
                         const ExchangeOptions& options) {
  int64_t route = 0;
  for (int64_t row = 0; row < view.num_rows(); ++row) {
    const int64_t count = view.num_routes_of(row);
    const int64_t most = std::min<int64_t>(options.top_k, view.num_routes() - route);
    TERNION_RETURN_IF_ERROR(CheckRange(origin, "route count of a row", count, 0, most));
    int64_t least_id = 0;
    for (const int64_t end = route + count; route < end; ++route) {
      const int64_t id = base::Index(view.route(route).expert);
      TERNION_RETURN_IF_ERROR(
          CheckRange(origin, "expert id", id, least_id, options.num_experts - 1));
      least_id = id + 1;
    }
  }
  return CheckField(origin, "sum of route counts", route, view.num_routes());
}

}  // namespace

void SealMessage(MessageHeader header, std::span<uint8_t> message) {
  header.crc32c = MessageCrc(header, message);
  std::memcpy(message.data(), &header, sizeof(header));
}

absl::StatusOr<MessageHeader> CheckHeader(std::span<const uint8_t> message,
                                          const MessageHeader& expected, RankId from) {
  const Origin origin{expected.phase, from};
  TERNION_RETURN_IF_ERROR(
      CheckRange(origin, "size", message.size(), sizeof(MessageHeader), SIZE_MAX));
  const auto header = Load<MessageHeader>(message.data());
  TERNION_RETURN_IF_ERROR(CheckField(origin, "magic", header.magic, expected.magic));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "version", header.version, expected.version));
  if (header.crc32c != MessageCrc(header, message)) {
    return absl::DataLossError(
        absl::StrCat(origin.Name(), ": checksum does not match its ", message.size(), " bytes"));
  }
  TERNION_RETURN_IF_ERROR(CheckField(origin, "phase", static_cast<uint64_t>(header.phase),
                                     static_cast<uint64_t>(expected.phase)));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "row format", static_cast<uint64_t>(header.format),
                                     static_cast<uint64_t>(expected.format)));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "step", header.step, expected.step));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "layer", header.layer, expected.layer));
  TERNION_RETURN_IF_ERROR(
      CheckField(origin, "micro-batch", header.micro_batch, expected.micro_batch));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "hidden", header.hidden, expected.hidden));
  return header;
}

DispatchLayout::DispatchLayout(RowFormat format, int64_t hidden, int64_t rows, int64_t routes)
    : row_bytes(kernels::CodeBytes(format, hidden)), weights(sizeof(MessageHeader)) {
  ids = weights + routes * sizeof(float);
  counts = ids + routes * sizeof(uint16_t);
  scales = base::RoundUp(counts + rows, sizeof(float));
  codes = scales + (HasScales(format) ? rows * sizeof(float) : 0);
  message_bytes = codes + rows * row_bytes;
  payload_bytes = message_bytes - scales;
}

void WriteDispatchMetadata(const DispatchLayout& layout, std::span<const DispatchPlan::Row> rows,
                           std::span<const Route> routes, const float* batch_scales,
                           std::span<uint8_t> message) {
  uint8_t* weight = message.data() + layout.weights;
  uint8_t* id = message.data() + layout.ids;
  uint8_t* count = message.data() + layout.counts;
  uint8_t* scale = message.data() + layout.scales;
  for (const DispatchPlan::Row& row : rows) {
    *count++ = static_cast<uint8_t>(row.num_routes);
    for (const Route& route : routes.subspan(row.first_route, row.num_routes)) {
      const uint16_t expert = static_cast<uint16_t>(base::Index(route.expert));
      std::memcpy(weight, &route.weight, sizeof(float));
      std::memcpy(id, &expert, sizeof(expert));
      weight += sizeof(float);
      id += sizeof(expert);
    }
  }
  std::fill(count, scale, uint8_t{0});
  if (layout.scales == layout.codes) return;
  for (const DispatchPlan::Row& row : rows) {
    std::memcpy(scale, &batch_scales[row.source], sizeof(float));
    scale += sizeof(float);
  }
}

DispatchView::DispatchView(const uint8_t* message, const DispatchLayout& layout,
                           const MessageHeader& header)
    : num_rows_(header.rows),
      num_routes_(header.routes),
      payload_bytes_(layout.payload_bytes),
      row_bytes_(layout.row_bytes),
      weights_(message + layout.weights),
      ids_(message + layout.ids),
      counts_(message + layout.counts),
      scales_(message + layout.scales),
      codes_(message + layout.codes) {}

Route DispatchView::route(int64_t index) const {
  return {ExpertId{Load<uint16_t>(ids_ + index * sizeof(uint16_t))},
          Load<float>(weights_ + index * sizeof(float))};
}

float DispatchView::scale(int64_t row) const { return Load<float>(scales_ + row * sizeof(float)); }

absl::StatusOr<DispatchView> ReadDispatch(std::span<const uint8_t> message,
                                          const MessageHeader& expected,
                                          const ExchangeOptions& options, RankId from) {
  TERNION_ASSIGN_OR_RETURN(const MessageHeader header, CheckHeader(message, expected, from));
  const Origin origin{Phase::kDispatch, from};
  TERNION_RETURN_IF_ERROR(CheckRange(origin, "rows", header.rows, 0, options.max_rows));
  TERNION_RETURN_IF_ERROR(
      CheckRange(origin, "routes", header.routes, 0, uint64_t{header.rows} * options.top_k));
  // rows and routes are below 2^32 and hidden is ours (ValidateExchangeOptions), so that no product
  // in the layout overflows.
  const DispatchLayout layout(header.format, header.hidden, header.rows, header.routes);
  TERNION_RETURN_IF_ERROR(
      CheckField(origin, "payload bytes", header.payload_bytes, layout.payload_bytes));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "size", message.size(), layout.message_bytes));
  const DispatchView view(message.data(), layout, header);
  TERNION_RETURN_IF_ERROR(CheckRoutes(origin, view, options));
  return view;
}

absl::Status CheckCombine(std::span<const uint8_t> message, const MessageHeader& expected,
                          RankId from) {
  TERNION_ASSIGN_OR_RETURN(const MessageHeader header, CheckHeader(message, expected, from));
  const Origin origin{Phase::kCombine, from};
  TERNION_RETURN_IF_ERROR(CheckField(origin, "rows", header.rows, expected.rows));
  TERNION_RETURN_IF_ERROR(CheckField(origin, "routes", header.routes, expected.routes));
  TERNION_RETURN_IF_ERROR(
      CheckField(origin, "payload bytes", header.payload_bytes, expected.payload_bytes));
  return CheckField(origin, "size", message.size(), sizeof(header) + expected.payload_bytes);
}

}  // namespace ternion::comm
