#include "comm/exchange.h"

#include <algorithm>
#include <cstring>

#include "base/checked.h"
#include "base/status.h"
#include "comm/wire.h"

namespace ternion::comm {
namespace {

constexpr int64_t kBytesPerThread = 16384;  // less row work than this is not worth another thread
constexpr int64_t kMaxHidden = int64_t{1} << 24;
constexpr int64_t kMaxRows = int64_t{1} << 24;
constexpr int kMaxTopK = 255;         // counts are one byte on the wire
constexpr int kMaxExperts = 1 << 16;  // ids are two

absl::Status CheckOption(const char* name, int64_t value, int64_t least, int64_t most) {
  if (least <= value && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("exchange: ", name, " is ", value, ", must be ", least, " to ", most));
}

// At least `count` elements; grows ahead, so that growing comes to an end.
void Reserve(base::Array<float>* array, int64_t count) {
  if (static_cast<int64_t>(array->size()) >= count) return;
  *array = base::Array<float>(std::max<int64_t>(count, 2 * array->size()));
}

void Reserve(kernels::QuantizedBuffer* buffer, int64_t rows, int64_t hidden) {
  if (buffer->max_rows() >= rows) return;
  *buffer = kernels::QuantizedBuffer(std::max(rows, 2 * buffer->max_rows()), hidden);
}

bool IsFloat(RowFormat format) { return format == RowFormat::kFp32 || format == RowFormat::kBf16; }

// fp32 parts of messages start at multiples of 4 bytes (wire.h).
const float* AsFloats(const uint8_t* bytes) { return reinterpret_cast<const float*>(bytes); }

}  // namespace

absl::Status ValidateExchangeOptions(const ExchangeOptions& options) {
  TERNION_RETURN_IF_ERROR(CheckOption("hidden", options.hidden, 1, kMaxHidden));
  TERNION_RETURN_IF_ERROR(CheckOption("max_rows", options.max_rows, 1, kMaxRows));
  TERNION_RETURN_IF_ERROR(CheckOption("num_experts", options.num_experts, 1, kMaxExperts));
  TERNION_RETURN_IF_ERROR(
      CheckOption("top_k", options.top_k, 1, std::min(kMaxTopK, options.num_experts)));
  if (options.act_bits != 8 && options.act_bits != 4) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange: act_bits is ", options.act_bits, ", must be 8 or 4"));
  }
  if (options.dispatch == RowFormat::kInt4 && options.act_bits != 4) {
    return absl::InvalidArgumentError(
        "exchange: int4 dispatch would round this model's 8-bit activations; choose int8");
  }
  if (!options.presum && options.combine != RowFormat::kFp32) {
    return absl::InvalidArgumentError(absl::StrCat(
        "exchange: the exact wire needs fp32 combine, not ", RowFormatName(options.combine)));
  }
  return absl::OkStatus();
}

struct Exchange::Peer {
  Message dispatch;                 // its rows, held until CombineRecv ends
  DispatchView view;                // into dispatch
  kernels::QuantizedBuffer codes;   // its rows, when dispatch does not hold int8 codes
  base::Array<float> floats;        // its rows at fp32: those to quantize, later those returned
  Message combine;                  // what it returns for this rank's rows
  const float* returned = nullptr;  // the same as fp32 [rows or routes, hidden]
  int64_t first_row = 0;            // where its rows and routes start in received_
  int64_t first_route = 0;
};

Exchange::Exchange(const ExchangeOptions& options, Transport* transport,
                   const kernels::Kernels* kernels, kernels::Executor* executor)
    : options_(options),
      transport_(transport),
      kernels_(kernels),
      executor_(executor),
      rank_(base::Index(transport->rank())),
      peers_(transport->size()) {
  TERNION_CHECK(ValidateExchangeOptions(options).ok());
  TERNION_CHECK(executor->threads != nullptr);
}

Exchange::~Exchange() = default;

bool Exchange::NeedsNormed() const { return IsFloat(options_.dispatch); }

// ---- Dispatch

absl::Status Exchange::DispatchSend(uint32_t step, uint32_t layer, const DispatchPlan& plan,
                                    const kernels::QuantizedRows& codes, const float* normed) {
  TERNION_CHECK(stage_ == Stage::kDispatchSend);
  TERNION_CHECK(plan.rank_begin.size() == peers_.size() + 1);
  TERNION_CHECK(plan.rank_begin.back() == static_cast<int64_t>(plan.rows.size()));
  TERNION_CHECK(codes.num_rows <= options_.max_rows && codes.dim == options_.hidden);
  TERNION_CHECK(normed != nullptr || !NeedsNormed() || plan.rows.empty());
  step_ = step;
  layer_ = layer;
  plan_ = plan;
  codes_ = codes;
  waiting_.clear();
  for (int rank = 0; rank < transport_->size(); ++rank) {
    if (rank == rank_) continue;
    TERNION_RETURN_IF_ERROR(SendDispatchTo(rank, normed));
    waiting_.push_back(RankId{rank});
  }
  stage_ = Stage::kDispatchRecv;
  return absl::OkStatus();
}

absl::Status Exchange::SendDispatchTo(int rank, const float* normed) {
  const std::span<const DispatchPlan::Row> rows = PlannedRows(rank);
  const int64_t routes = PlannedRoutes(rank);
  const DispatchLayout layout(options_.dispatch, options_.hidden, rows.size(), routes);
  Message message = transport_->Acquire(layout.message_bytes);
  WriteDispatchMetadata(layout, rows, plan_.routes, codes_.scales, message.bytes());
  uint8_t* out = message.bytes().data() + layout.codes;
  ForRows(rows.size(), [&](int64_t i) {
    const int64_t source = rows[i].source;
    uint8_t* row_out = out + i * layout.row_bytes;
    const int8_t* codes = codes_.codes + source * codes_.stride;
    if (options_.dispatch == RowFormat::kInt8) {
      std::memcpy(row_out, codes, options_.hidden);
    } else if (options_.dispatch == RowFormat::kInt4) {
      PackInt4(codes, options_.hidden, row_out);
    } else {
      EncodeCombineRow(options_.dispatch, normed + source * options_.hidden, options_.hidden,
                       row_out);
    }
  });
  return Send(rank, HeaderOf(Phase::kDispatch, rows.size(), routes, layout.payload_bytes),
              std::move(message));
}

absl::StatusOr<const ReceivedRows*> Exchange::DispatchRecv() {
  TERNION_CHECK(stage_ == Stage::kDispatchRecv);
  while (!waiting_.empty()) {
    TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport_->Receive(waiting_, Phase::kDispatch));
    std::erase(waiting_, arrival.from);
    TERNION_RETURN_IF_ERROR(TakeDispatch(std::move(arrival)));
  }
  TERNION_RETURN_IF_ERROR(transport_->Flush());  // the experts run next
  received_.rows.clear();
  received_.routes.clear();
  for (int rank = 0; rank < transport_->size(); ++rank) {
    peers_[rank].first_row = received_.rows.size();
    peers_[rank].first_route = received_.routes.size();
    if (rank == rank_) {
      AppendOwnRows();
    } else {
      AppendRowsOf(peers_[rank]);
    }
  }
  stage_ = Stage::kCombineSend;
  return &received_;
}

absl::Status Exchange::TakeDispatch(Arrival arrival) {
  Peer& peer = peers_[base::Index(arrival.from)];
  peer.dispatch = std::move(arrival.message);
  TERNION_ASSIGN_OR_RETURN(
      peer.view, ReadDispatch(peer.dispatch.bytes(), HeaderOf(Phase::kDispatch, 0, 0, 0), options_,
                              arrival.from));
  if (peer.view.num_rows() > 0 && options_.dispatch != RowFormat::kInt8) WidenCodes(peer);
  return absl::OkStatus();
}

// peer.codes from what is in the message: int4 codes unpacked, or float rows quantized just as
// their owner did.
void Exchange::WidenCodes(Peer& peer) {
  const int64_t hidden = options_.hidden;
  Reserve(&peer.codes, peer.view.num_rows(), hidden);
  const kernels::QuantizedRows out = peer.codes.rows(peer.view.num_rows());
  if (options_.dispatch == RowFormat::kInt4) {
    ForRows(out.num_rows, [&](int64_t row) {
      UnpackInt4(peer.view.codes(row), hidden, out.codes + row * out.stride);
      out.scales[row] = peer.view.scale(row);
    });
    return;
  }
  const float* rows = FloatRows(options_.dispatch, peer.view.codes(0), out.num_rows, &peer.floats);
  kernels_->quantize({.x = rows, .out = out, .x_stride = hidden, .bits = options_.act_bits},
                     *executor_);
}

void Exchange::AppendRowsOf(Peer& peer) {
  const DispatchView& view = peer.view;
  const bool in_message = options_.dispatch == RowFormat::kInt8;
  const kernels::QuantizedRows widened = peer.codes.rows(view.num_rows());
  int32_t first_route = static_cast<int32_t>(received_.routes.size());
  for (int64_t i = 0; i < view.num_rows(); ++i) {
    ReceivedRow row;
    row.codes = in_message ? reinterpret_cast<const int8_t*>(view.codes(i))
                           : widened.codes + i * widened.stride;
    row.scale = in_message ? view.scale(i) : widened.scales[i];
    row.first_route = first_route;
    row.num_routes = view.num_routes_of(i);
    received_.rows.push_back(row);
    first_route += row.num_routes;
  }
  for (int64_t i = 0; i < view.num_routes(); ++i) received_.routes.push_back(view.route(i));
}

void Exchange::AppendOwnRows() {
  for (const DispatchPlan::Row& row : PlannedRows(rank_)) {
    received_.rows.push_back({.codes = codes_.codes + row.source * codes_.stride,
                              .scale = codes_.scales[row.source],
                              .first_route = static_cast<int32_t>(received_.routes.size()),
                              .num_routes = row.num_routes});
    const auto routes = plan_.routes.begin() + row.first_route;
    received_.routes.insert(received_.routes.end(), routes, routes + row.num_routes);
  }
  const int64_t rows = PlannedRows(rank_).size();
  const DispatchLayout layout(options_.dispatch, options_.hidden, rows, 0);
  CountTraffic(Phase::kDispatch, rank_, {.payload_bytes = layout.payload_bytes, .rows = rows});
}

// ---- Combine

absl::Status Exchange::CombineSend(const float* outputs) {
  TERNION_CHECK(stage_ == Stage::kCombineSend);
  for (int rank = 0; rank < transport_->size(); ++rank) {
    Peer& peer = peers_[rank];
    const int64_t first = options_.presum ? peer.first_row : peer.first_route;
    const float* rows = outputs + first * options_.hidden;
    if (rank == rank_) {
      peer.returned = rows;  // never encoded: own sums are not rounded
      const int64_t count = PlannedRows(rank).size();
      CountTraffic(Phase::kCombine, rank,
                   {.payload_bytes = static_cast<int64_t>(
                        CombineHeader(count, PlannedRoutes(rank)).payload_bytes),
                    .rows = count});
    } else if (peer.view.num_rows() > 0) {
      TERNION_RETURN_IF_ERROR(SendCombineTo(rank, rows));
    }
  }
  stage_ = Stage::kCombineRecv;
  return absl::OkStatus();
}

absl::Status Exchange::SendCombineTo(int rank, const float* rows) {
  const DispatchView& view = peers_[rank].view;
  const MessageHeader header = CombineHeader(view.num_rows(), view.num_routes());
  Message message = transport_->Acquire(sizeof(header) + header.payload_bytes);
  uint8_t* out = message.bytes().data() + sizeof(header);
  const int64_t row_bytes = CombineRowBytes(options_.combine, options_.hidden);
  ForRows(header.payload_bytes / row_bytes, [&](int64_t i) {
    EncodeCombineRow(options_.combine, rows + i * options_.hidden, options_.hidden,
                     out + i * row_bytes);
  });
  return Send(rank, header, std::move(message));
}

absl::Status Exchange::CombineRecv(float* out) {
  TERNION_CHECK(stage_ == Stage::kCombineRecv);
  for (int rank = 0; rank < transport_->size(); ++rank) {
    if (rank != rank_ && !PlannedRows(rank).empty()) waiting_.push_back(RankId{rank});
  }
  while (!waiting_.empty()) {
    TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport_->Receive(waiting_, Phase::kCombine));
    std::erase(waiting_, arrival.from);
    TERNION_RETURN_IF_ERROR(TakeCombine(std::move(arrival)));
  }
  TERNION_RETURN_IF_ERROR(transport_->Flush());  // the next layer's attention runs next
  CollectTerms();
  kernels_->weighted_sum({.terms = term_rows_.data(),
                          .weights = options_.presum ? nullptr : term_weights_.data(),
                          .begin = term_begin_.data(),
                          .out = out,
                          .num_rows = codes_.num_rows,
                          .dim = options_.hidden,
                          .accumulate = true},
                         *executor_);
  for (Peer& peer : peers_) {
    transport_->Recycle(std::move(peer.dispatch));
    transport_->Recycle(std::move(peer.combine));
  }
  stage_ = Stage::kDispatchSend;
  return absl::OkStatus();
}

absl::Status Exchange::TakeCombine(Arrival arrival) {
  const int rank = base::Index(arrival.from);
  Peer& peer = peers_[rank];
  peer.combine = std::move(arrival.message);
  const MessageHeader expected = CombineHeader(PlannedRows(rank).size(), PlannedRoutes(rank));
  TERNION_RETURN_IF_ERROR(CheckCombine(peer.combine.bytes(), expected, arrival.from));
  const int64_t num_rows = options_.presum ? expected.rows : expected.routes;
  peer.returned = FloatRows(options_.combine, peer.combine.bytes().data() + sizeof(expected),
                            num_rows, &peer.floats);
  return absl::OkStatus();
}

// Calls visit(own row, term) for every row that came back, by rank.
template <typename Visit>
void Exchange::ForEachTerm(Visit&& visit) const {
  for (int rank = 0; rank < transport_->size(); ++rank) {
    const float* returned = peers_[rank].returned;
    for (const DispatchPlan::Row& row : PlannedRows(rank)) {
      const int count = options_.presum ? 1 : row.num_routes;
      for (int i = 0; i < count; ++i, returned += options_.hidden) {
        const Route& route = plan_.routes[row.first_route + i];
        visit(row.source, options_.presum
                              ? Term{rank, 1, returned}
                              : Term{base::Index(route.expert), route.weight, returned});
      }
    }
  }
}

// Groups the returned rows by own row, in the order in which they are added.
void Exchange::CollectTerms() {
  term_begin_.assign(codes_.num_rows + 2, 0);
  ForEachTerm([&](int32_t row, const Term&) { ++term_begin_[row + 2]; });
  for (size_t i = 2; i < term_begin_.size(); ++i) term_begin_[i] += term_begin_[i - 1];
  terms_.resize(term_begin_.back());
  // term_begin_[row + 1] moves from the row's first term to its end, which is where the next row
  // begins.
  ForEachTerm([&](int32_t row, const Term& term) { terms_[term_begin_[row + 1]++] = term; });
  for (int64_t row = 0; row < codes_.num_rows; ++row) {
    std::sort(terms_.begin() + term_begin_[row], terms_.begin() + term_begin_[row + 1],
              [](const Term& a, const Term& b) { return a.order < b.order; });
  }
  term_rows_.clear();
  term_weights_.clear();
  for (const Term& term : terms_) {
    term_rows_.push_back(term.row);
    term_weights_.push_back(term.weight);
  }
}

// ---- Shared by both ways

std::span<const DispatchPlan::Row> Exchange::PlannedRows(int rank) const {
  const int32_t begin = plan_.rank_begin[rank];
  return std::span(plan_.rows).subspan(begin, plan_.rank_begin[rank + 1] - begin);
}

int64_t Exchange::PlannedRoutes(int rank) const {
  int64_t routes = 0;
  for (const DispatchPlan::Row& row : PlannedRows(rank)) routes += row.num_routes;
  return routes;
}

MessageHeader Exchange::HeaderOf(Phase phase, int64_t rows, int64_t routes,
                                 int64_t payload_bytes) const {
  MessageHeader header;
  header.phase = phase;
  header.format = phase == Phase::kDispatch ? options_.dispatch : options_.combine;
  header.step = step_;
  header.layer = layer_;
  header.hidden = static_cast<uint32_t>(options_.hidden);
  header.rows = static_cast<uint32_t>(rows);
  header.routes = static_cast<uint32_t>(routes);
  header.payload_bytes = payload_bytes;
  return header;
}

// The header over what comes back for `rows` dispatched rows that have `routes`.
MessageHeader Exchange::CombineHeader(int64_t rows, int64_t routes) const {
  const int64_t returned = options_.presum ? rows : routes;
  return HeaderOf(Phase::kCombine, rows, options_.presum ? 0 : routes,
                  returned * CombineRowBytes(options_.combine, options_.hidden));
}

absl::Status Exchange::Send(int rank, const MessageHeader& header, Message message) {
  SealMessage(header, message.bytes());
  CountTraffic(header.phase, rank,
               {.payload_bytes = static_cast<int64_t>(header.payload_bytes),
                .message_bytes = static_cast<int64_t>(message.size_bytes),
                .messages = 1,
                .rows = header.rows});
  return transport_->Send(RankId{rank}, header.phase, std::move(message));
}

// `num_rows` rows of fp32 or of a combine format as fp32 [num_rows, hidden]: where they are, or in
// `decoded`.
const float* Exchange::FloatRows(RowFormat format, const uint8_t* bytes, int64_t num_rows,
                                 base::Array<float>* decoded) {
  if (format == RowFormat::kFp32) return AsFloats(bytes);
  const int64_t hidden = options_.hidden;
  const int64_t row_bytes = CombineRowBytes(format, hidden);
  Reserve(decoded, num_rows * hidden);
  ForRows(num_rows, [&](int64_t i) {
    DecodeCombineRow(format, bytes + i * row_bytes, hidden, decoded->data() + i * hidden);
  });
  return decoded->data();
}

// body(row) for each of `count` rows, on the rank's threads.
template <typename Body>
void Exchange::ForRows(int64_t count, Body&& body) {
  const int64_t rows_per_thread = std::max<int64_t>(1, kBytesPerThread / options_.hidden);
  executor_->threads->ParallelFor(count, rows_per_thread,
                                  [&](int64_t begin, int64_t end, int /*thread*/) {
                                    for (int64_t row = begin; row < end; ++row) body(row);
                                  });
}

void Exchange::CountTraffic(Phase phase, int rank, const TrafficCount& count) {
  transport_->traffic().Add(phase, transport_->ScopeOf(RankId{rank}), count);
}

}  // namespace ternion::comm
