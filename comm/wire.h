// The messages between ranks, byte by byte, and the checks that stand before any use of them.
//
// clang-format off
//   dispatch         header | float weights[routes] | uint16 ids[routes] | uint8 counts[rows]
//                    | 0 to 3 zero bytes | float scales[rows] (int8 and int4 only)
//                    | codes[rows][CodeBytes]
//   combine (presum) header | one row of EncodedRowBytes per dispatched row
//   combine (exact)  header | one row of EncodedRowBytes per route
//   control          header | any bytes
// clang-format on
//
// counts[i] is the number of routes of row i; weights and ids are grouped by row, ids ascending.
// Numbers are little-endian. Every part but the last starts at a multiple of its element size. fp32
// codes do too, so that they can be used where they are. Payload is scales and codes; the rest is
// framing.
//
// Errors name the peer and the field: DataLoss for a wrong checksum, InvalidArgument for anything
// else.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/codec.h"
#include "comm/exchange.h"
#include "comm/traffic.h"

namespace ternion::comm {

inline constexpr uint32_t kWireMagic = 0x4E524554;  // "TERN"
inline constexpr uint16_t kWireVersion = 2;

// Starts every message.
struct MessageHeader {
  uint32_t magic = kWireMagic;
  uint16_t version = kWireVersion;
  Phase phase{};
  RowFormat format{};  // of codes
  uint32_t step = 0;
  uint16_t layer = 0;
  uint16_t micro_batch = 0;  // which of those under way at a time
  uint32_t hidden = 0;       // elements of a row
  uint32_t rows = 0;
  uint32_t routes = 0;  // dispatch, exact combine: all rows' routes; else 0
  uint32_t crc32c = 0;  // Castagnoli, over the whole message with this field 0
  uint64_t payload_bytes = 0;
};
static_assert(sizeof(MessageHeader) == 40);

// Writes `header` at the start of `message` and sets its checksum; the rest must be complete.
void SealMessage(MessageHeader header, std::span<uint8_t> message);

// The header of a message from `from` whose checksum is right, and whose phase, format, step,
// layer, micro-batch and hidden are those of `expected`. Other fields are not looked at.
absl::StatusOr<MessageHeader> CheckHeader(std::span<const uint8_t> message,
                                          const MessageHeader& expected, RankId from);

// Where the parts of a dispatch message start, in bytes. weights start after the header.
struct DispatchLayout {
  DispatchLayout(RowFormat format, int64_t hidden, int64_t rows, int64_t routes);

  int64_t row_bytes = 0;  // codes of one row
  int64_t weights = 0;
  int64_t ids = 0;
  int64_t counts = 0;
  int64_t scales = 0;
  int64_t codes = 0;
  int64_t message_bytes = 0;
  int64_t payload_bytes = 0;  // scales .. end
};

// Writes all of a dispatch message but its header and its codes. `rows` point into plan.routes.
void WriteDispatchMetadata(const DispatchLayout& layout, std::span<const DispatchPlan::Row> rows,
                           std::span<const Route> routes, const float* batch_scales,
                           std::span<uint8_t> message);

// Views of the parts of a dispatch message that passed every check.
class DispatchView {
 public:
  DispatchView() = default;
  DispatchView(const uint8_t* message, const DispatchLayout& layout, const MessageHeader& header);

  int64_t num_rows() const { return num_rows_; }
  int64_t num_routes() const { return num_routes_; }
  int64_t payload_bytes() const { return payload_bytes_; }
  int num_routes_of(int64_t row) const { return counts_[row]; }
  Route route(int64_t index) const;  // grouped by row
  float scale(int64_t row) const;    // int8 and int4 only
  const uint8_t* codes(int64_t row) const { return codes_ + row * row_bytes_; }

 private:
  int64_t num_rows_ = 0;
  int64_t num_routes_ = 0;
  int64_t payload_bytes_ = 0;
  int64_t row_bytes_ = 0;
  const uint8_t* weights_ = nullptr;
  const uint8_t* ids_ = nullptr;
  const uint8_t* counts_ = nullptr;
  const uint8_t* scales_ = nullptr;
  const uint8_t* codes_ = nullptr;
};

// Checks all of a dispatch message against `expected` (as CheckHeader) and the limits in `options`.
// The view points into `message`.
absl::StatusOr<DispatchView> ReadDispatch(std::span<const uint8_t> message,
                                          const MessageHeader& expected,
                                          const ExchangeOptions& options, RankId from);

// Checks all of a combine message against `expected`: as CheckHeader, and rows, routes and
// payload_bytes too, since the owner knows what must come back. Its rows start behind the header.
absl::Status CheckCombine(std::span<const uint8_t> message, const MessageHeader& expected,
                          RankId from);

}  // namespace ternion::comm
