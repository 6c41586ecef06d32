#include "comm/exchange.h"

#include <algorithm>
#include <cstring>

#include "base/checked.h"
#include "base/status.h"
#include "comm/finish.h"
#include "comm/wire.h"

namespace ternion::comm {
namespace {

// At least `count` elements; grows ahead, so that growing comes to an end.
void Reserve(base::Array<float>* array, int64_t count, const kernels::Executor& executor) {
  if (static_cast<int64_t>(array->size()) >= count) return;
  *array = base::Array<float>(std::max<int64_t>(count, 2 * array->size()), *executor.memory);
}

void Reserve(kernels::QuantizedBuffer* buffer, int64_t rows, int64_t hidden,
             const kernels::Executor& executor) {
  if (buffer->max_rows() >= rows) return;
  *buffer = kernels::QuantizedBuffer(std::max(rows, 2 * buffer->max_rows()), hidden,
                                     *executor.memory, *executor.staging);
}

bool IsFloat(RowFormat format) { return format == RowFormat::kFp32 || format == RowFormat::kBf16; }

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// fp32 parts of messages start at multiples of 4 bytes (wire.h).
const float* AsFloats(const uint8_t* bytes) { return reinterpret_cast<const float*>(bytes); }

std::vector<RankId> AllRanks(const Transport& transport) {
  std::vector<RankId> ranks;
  for (int rank = 0; rank < transport.size(); ++rank) ranks.push_back(RankId{rank});
  return ranks;
}

}  // namespace

void ReceivedRows::Clear() {
  rows.clear();
  routes.clear();
}

struct Exchange::Peer {
  enum class Rows { kAwaited, kReady, kHandedOut };
  Rows rows = Rows::kAwaited;      // its rows of this layer; this rank's own are ready at once
  bool in_hand = false;            // among those that DispatchRecv handed out last
  Message dispatch;                // its rows, held until CombineRecv ends
  DispatchView view;               // into dispatch
  kernels::QuantizedBuffer codes;  // its rows, when dispatch does not hold int8 codes
  base::Array<float> floats;       // its rows decoded, when dispatch holds bf16
  Message combine;                 // what it returns for this rank's rows; may come before dispatch
  const void* returned = nullptr;  // its encoded rows [rows or routes]; this rank's own at fp32
  int64_t first_row = 0;           // where its rows and routes start in received_
  int64_t first_route = 0;
};

Exchange::Exchange(const ExchangeOptions& options, Transport* transport,
                   const kernels::Kernels* kernels, kernels::Executor* executor,
                   std::vector<RankId> group)
    : options_(options),
      transport_(transport),
      kernels_(kernels),
      executor_(executor),
      group_(group.empty() ? AllRanks(*transport) : std::move(group)),
      seat_(SeatOf(transport->rank())),
      scales_(options.max_rows, *executor->staging),
      sources_(executor->staging),
      peers_(group_.size()),
      term_begin_(executor->staging),
      row_terms_(executor->staging) {
  TERNION_CHECK(ValidateExchangeOptions(options).ok());
  TERNION_CHECK(executor->threads != nullptr);
}

Exchange::~Exchange() = default;

int Exchange::SeatOf(RankId rank) const {
  const auto found = std::find(group_.begin(), group_.end(), rank);
  TERNION_CHECK(found != group_.end());
  return static_cast<int>(found - group_.begin());
}

bool Exchange::NeedsNormed() const { return IsFloat(options_.dispatch); }

// ---- Dispatch

absl::Status Exchange::DispatchSend(uint32_t step, uint32_t layer, const DispatchPlan& plan,
                                    const kernels::QuantizedRows& codes, const float* normed) {
  TERNION_CHECK(stage_ == Stage::kDispatchSend && layer <= UINT16_MAX);
  TERNION_CHECK(plan.rank_begin.size() == peers_.size() + 1);
  TERNION_CHECK(plan.rank_begin.back() == static_cast<int64_t>(plan.rows.size()));
  TERNION_CHECK(codes.num_rows <= options_.max_rows && codes.dim == options_.hidden);
  TERNION_CHECK(normed != nullptr || !NeedsNormed() || plan.rows.empty());
  step_ = step;
  layer_ = layer;
  plan_ = plan;
  codes_ = codes;
  dispatch_awaited_.clear();
  combine_awaited_.clear();
  for (Peer& peer : peers_) peer.rows = Peer::Rows::kAwaited;
  peers_[seat_].rows = Peer::Rows::kReady;
  kernels_->encode_rows({.x = codes.scales,
                         .out = reinterpret_cast<uint8_t*>(scales_.data()),
                         .num_rows = codes.num_rows > 0 ? 1 : 0,
                         .dim = codes.num_rows,
                         .format = RowFormat::kFp32},
                        *executor_);
  TERNION_RETURN_IF_ERROR(Finish(*kernels_, *executor_));
  // Every rank starts behind itself, so that they do not all send to the same one at first.
  for (int i = 1; i < size(); ++i) {
    const int seat = (seat_ + i) % size();
    TERNION_RETURN_IF_ERROR(SendDispatchTo(seat, normed));
    dispatch_awaited_.push_back({group_[seat], Phase::kDispatch});
    if (!PlannedRows(seat).empty()) combine_awaited_.push_back({group_[seat], Phase::kCombine});
  }
  stage_ = Stage::kDispatchRecv;
  SetUnderWay(!dispatch_awaited_.empty());
  return absl::OkStatus();
}

absl::Status Exchange::SendDispatchTo(int seat, const float* normed) {
  const std::span<const DispatchPlan::Row> rows = PlannedRows(seat);
  const int64_t routes = PlannedRoutes(seat);
  const DispatchLayout layout(options_.dispatch, options_.hidden, rows.size(), routes);
  Message message = transport_->Acquire(layout.message_bytes);
  WriteDispatchMetadata(layout, rows, plan_.routes, scales_.data(), message.bytes());
  TERNION_RETURN_IF_ERROR(WriteRows(rows, normed, message.bytes().data() + layout.codes));
  return Send(seat, HeaderOf(Phase::kDispatch, rows.size(), routes, layout.payload_bytes),
              std::move(message));
}

// The rows' codes, or the rows themselves, from the batch.
absl::Status Exchange::WriteRows(std::span<const DispatchPlan::Row> rows, const float* normed,
                                 uint8_t* out) {
  sources_.clear();
  for (const DispatchPlan::Row& row : rows) sources_.push_back(row.source);
  const int64_t num_rows = rows.size();
  if (NeedsNormed()) {
    kernels_->encode_rows({.x = normed,
                           .rows = sources_.data(),
                           .out = out,
                           .num_rows = num_rows,
                           .dim = options_.hidden,
                           .x_stride = options_.hidden,
                           .format = options_.dispatch},
                          *executor_);
  } else {
    kernels_->pack_codes({.codes = codes_.codes,
                          .rows = sources_.data(),
                          .out = out,
                          .num_rows = num_rows,
                          .dim = options_.hidden,
                          .codes_stride = codes_.stride,
                          .format = options_.dispatch},
                         *executor_);
  }
  return Finish(*kernels_, *executor_);
}

absl::StatusOr<const ReceivedRows*> Exchange::DispatchRecv(int64_t min_routes, Exchange* other) {
  TERNION_CHECK(stage_ == Stage::kDispatchRecv);
  TERNION_CHECK(other == nullptr || other->stage_ == Stage::kCombineRecv);
  received_.Clear();
  while (!dispatch_awaited_.empty() && ReadyRoutes() < min_routes) {
    if (other != nullptr && other->IsBack()) return &received_;
    TERNION_RETURN_IF_ERROR(Wait(other));
  }
  if (NeedsNormed()) TERNION_RETURN_IF_ERROR(Finish(*kernels_, *executor_));  // WidenCodes' scales
  HandOutReady();
  if (!received_.rows.empty()) {
    stage_ = Stage::kCombineSend;
    return &received_;
  }
  stage_ = Stage::kCombineRecv;
  SetUnderWay(!combine_awaited_.empty());
  return nullptr;
}

// For the meter: whether rows of this exchange travel and nothing of it can be worked on.
void Exchange::SetUnderWay(bool under_way) {
  if (under_way != under_way_) under_way ? meter().RowsLeave() : meter().RowsArrived();
  under_way_ = under_way;
}

// Takes in the next message of this exchange or of the other's combine.
absl::Status Exchange::Wait(Exchange* other) {
  // What comes back for these rows is not looked for yet: from the same peer, the other
  // micro-batch's may come first.
  const std::vector<Awaited>& own =
      stage_ == Stage::kDispatchRecv ? dispatch_awaited_ : combine_awaited_;
  awaited_.assign(own.begin(), own.end());
  if (other != nullptr) {
    awaited_.insert(awaited_.end(), other->combine_awaited_.begin(), other->combine_awaited_.end());
  }
  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<Arrival> arrival = transport_->Receive(awaited_);
  meter().AddWait(SecondsSince(start));
  if (!arrival.ok()) return arrival.status();
  const bool of_other = other != nullptr && arrival->what.phase == Phase::kCombine;
  return (of_other ? other : this)->Take(*std::move(arrival));
}

absl::Status Exchange::Take(Arrival arrival) {
  const Phase phase = arrival.what.phase;
  std::vector<Awaited>& awaited = phase == Phase::kDispatch ? dispatch_awaited_ : combine_awaited_;
  std::erase(awaited, arrival.what);
  if (awaited.empty() && (phase == Phase::kDispatch || stage_ == Stage::kCombineRecv)) {
    SetUnderWay(false);
  }
  const int seat = SeatOf(arrival.what.from);
  return phase == Phase::kDispatch ? TakeDispatch(seat, std::move(arrival.message))
                                   : TakeCombine(seat, std::move(arrival.message));
}

absl::Status Exchange::TakeDispatch(int seat, Message message) {
  Peer& peer = peers_[seat];
  peer.dispatch = std::move(message);
  TERNION_ASSIGN_OR_RETURN(
      peer.view, ReadDispatch(peer.dispatch.bytes(), HeaderOf(Phase::kDispatch, 0, 0, 0), options_,
                              group_[seat]));
  peer.rows = Peer::Rows::kReady;
  CountMessage(Direction::kReceived, seat,
               HeaderOf(Phase::kDispatch, peer.view.num_rows(), 0, peer.view.payload_bytes()),
               peer.dispatch);
  if (peer.view.num_rows() > 0 && options_.dispatch != RowFormat::kInt8) WidenCodes(peer);
  return absl::OkStatus();
}

// Routes that are here and not handed out.
int64_t Exchange::ReadyRoutes() const {
  int64_t routes = 0;
  for (int seat = 0; seat < size(); ++seat) {
    const Peer& peer = peers_[seat];
    if (peer.rows != Peer::Rows::kReady) continue;
    routes += seat == seat_ ? PlannedRoutes(seat) : peer.view.num_routes();
  }
  return routes;
}

void Exchange::HandOutReady() {
  for (int seat = 0; seat < size(); ++seat) {
    Peer& peer = peers_[seat];
    peer.in_hand = peer.rows == Peer::Rows::kReady;
    if (!peer.in_hand) continue;
    peer.rows = Peer::Rows::kHandedOut;
    peer.first_row = received_.rows.size();
    peer.first_route = received_.routes.size();
    if (seat == seat_) {
      AppendOwnRows();
    } else {
      AppendRowsOf(peer);
    }
  }
}

// peer.codes from what is in the message: int4 codes unpacked, or float rows quantized just as
// their owner did.
void Exchange::WidenCodes(Peer& peer) {
  const int64_t hidden = options_.hidden;
  Reserve(&peer.codes, peer.view.num_rows(), hidden, *executor_);
  const kernels::QuantizedRows out = peer.codes.rows(peer.view.num_rows());
  const uint8_t* rows = peer.view.codes(0);
  if (options_.dispatch == RowFormat::kInt4) {
    kernels_->unpack_int4({.packed = rows,
                           .codes = out.codes,
                           .num_rows = out.num_rows,
                           .dim = hidden,
                           .codes_stride = out.stride},
                          *executor_);
    for (int64_t i = 0; i < out.num_rows; ++i) out.scales[i] = peer.view.scale(i);
    return;
  }
  const float* floats = AsFloats(rows);
  if (options_.dispatch == RowFormat::kBf16) {
    Reserve(&peer.floats, out.num_rows * hidden, *executor_);
    kernels_->decode_rows({.rows = rows,
                           .out = peer.floats.data(),
                           .num_rows = out.num_rows,
                           .dim = hidden,
                           .format = RowFormat::kBf16},
                          *executor_);
    floats = peer.floats.data();
  }
  kernels_->quantize({.x = floats, .out = out, .x_stride = hidden, .bits = options_.act_bits},
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
  for (const DispatchPlan::Row& row : PlannedRows(seat_)) {
    received_.rows.push_back({.codes = codes_.codes + row.source * codes_.stride,
                              .scale = scales_[row.source],
                              .first_route = static_cast<int32_t>(received_.routes.size()),
                              .num_routes = row.num_routes});
    const auto routes = plan_.routes.begin() + row.first_route;
    received_.routes.insert(received_.routes.end(), routes, routes + row.num_routes);
  }
  const int64_t rows = PlannedRows(seat_).size();
  const DispatchLayout layout(options_.dispatch, options_.hidden, rows, 0);
  meter().Add(Direction::kSent, Phase::kDispatch, group_[seat_],
              {.payload_bytes = layout.payload_bytes, .rows = rows});
}

// ---- Combine

absl::Status Exchange::CombineSend(const float* outputs) {
  TERNION_CHECK(stage_ == Stage::kCombineSend);
  for (int i = 0; i < size(); ++i) {
    const int seat = (seat_ + i) % size();
    Peer& peer = peers_[seat];
    if (!peer.in_hand) continue;
    const int64_t first = options_.presum ? peer.first_row : peer.first_route;
    const float* rows = outputs + first * options_.hidden;
    if (seat == seat_) {
      peer.returned = rows;  // never encoded: own sums are not rounded
      CountOwnCombine();
    } else if (peer.view.num_rows() > 0) {
      TERNION_RETURN_IF_ERROR(SendCombineTo(seat, rows));
    }
  }
  stage_ = Stage::kDispatchRecv;
  return absl::OkStatus();
}

void Exchange::CountOwnCombine() {
  const int64_t rows = PlannedRows(seat_).size();
  const MessageHeader header = CombineHeader(rows, PlannedRoutes(seat_));
  meter().Add(Direction::kSent, Phase::kCombine, group_[seat_],
              {.payload_bytes = static_cast<int64_t>(header.payload_bytes), .rows = rows});
}

absl::Status Exchange::SendCombineTo(int seat, const float* rows) {
  const DispatchView& view = peers_[seat].view;
  const MessageHeader header = CombineHeader(view.num_rows(), view.num_routes());
  Message message = transport_->Acquire(sizeof(header) + header.payload_bytes);
  kernels_->encode_rows({.x = rows,
                         .out = message.bytes().data() + sizeof(header),
                         .num_rows = options_.presum ? view.num_rows() : view.num_routes(),
                         .dim = options_.hidden,
                         .x_stride = options_.hidden,
                         .format = options_.combine},
                        *executor_);
  TERNION_RETURN_IF_ERROR(Finish(*kernels_, *executor_));
  return Send(seat, header, std::move(message));
}

absl::StatusOr<bool> Exchange::CombineReady() {
  TERNION_CHECK(stage_ == Stage::kCombineRecv);
  while (!IsBack()) {
    TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival,
                             transport_->TryReceive(combine_awaited_));
    if (!arrival) return false;
    TERNION_RETURN_IF_ERROR(Take(*std::move(arrival)));
  }
  return true;
}

absl::Status Exchange::CombineRecv(float* out) {
  TERNION_CHECK(stage_ == Stage::kCombineRecv);
  while (!IsBack()) TERNION_RETURN_IF_ERROR(Wait(nullptr));
  CollectTerms();
  kernels_->add_rows({.terms = row_terms_.data(),
                      .begin = term_begin_.data(),
                      .out = out,
                      .num_rows = codes_.num_rows,
                      .dim = options_.hidden},
                     *executor_);
  TERNION_RETURN_IF_ERROR(Finish(*kernels_, *executor_));
  for (Peer& peer : peers_) {
    transport_->Recycle(std::move(peer.dispatch));
    transport_->Recycle(std::move(peer.combine));
  }
  stage_ = Stage::kDispatchSend;
  return absl::OkStatus();
}

absl::Status Exchange::Flush() {
  const auto start = std::chrono::steady_clock::now();
  const absl::Status status = transport_->Flush();
  meter().AddWait(SecondsSince(start));
  return status;
}

absl::Status Exchange::TakeCombine(int seat, Message message) {
  Peer& peer = peers_[seat];
  peer.combine = std::move(message);
  const MessageHeader expected = CombineHeader(PlannedRows(seat).size(), PlannedRoutes(seat));
  TERNION_RETURN_IF_ERROR(CheckCombine(peer.combine.bytes(), expected, group_[seat]));
  CountMessage(Direction::kReceived, seat, expected, peer.combine);
  peer.returned = peer.combine.bytes().data() + sizeof(expected);
  return absl::OkStatus();
}

// Calls visit(own row, term) for every row that came back, by rank.
template <typename Visit>
void Exchange::ForEachTerm(Visit&& visit) const {
  for (int seat = 0; seat < size(); ++seat) {
    const RowFormat format = seat == seat_ ? RowFormat::kFp32 : options_.combine;
    const int64_t row_bytes = kernels::EncodedRowBytes(format, options_.hidden);
    const uint8_t* returned = static_cast<const uint8_t*>(peers_[seat].returned);
    for (const DispatchPlan::Row& row : PlannedRows(seat)) {
      const int count = options_.presum ? 1 : row.num_routes;
      for (int i = 0; i < count; ++i, returned += row_bytes) {
        const Route& route = plan_.routes[row.first_route + i];
        visit(row.source, options_.presum
                              ? Term{seat, {returned, format, 1}}
                              : Term{base::Index(route.expert), {returned, format, route.weight}});
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
  row_terms_.clear();
  for (const Term& term : terms_) row_terms_.push_back(term.row);
}

// ---- Shared by both ways

std::span<const DispatchPlan::Row> Exchange::PlannedRows(int seat) const {
  const int32_t begin = plan_.rank_begin[seat];
  return std::span(plan_.rows).subspan(begin, plan_.rank_begin[seat + 1] - begin);
}

int64_t Exchange::PlannedRoutes(int seat) const {
  int64_t routes = 0;
  for (const DispatchPlan::Row& row : PlannedRows(seat)) routes += row.num_routes;
  return routes;
}

MessageHeader Exchange::HeaderOf(Phase phase, int64_t rows, int64_t routes,
                                 int64_t payload_bytes) const {
  MessageHeader header;
  header.phase = phase;
  header.format = phase == Phase::kDispatch ? options_.dispatch : options_.combine;
  header.step = step_;
  header.layer = static_cast<uint16_t>(layer_);
  header.micro_batch = static_cast<uint16_t>(options_.micro_batch);
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
                  returned * kernels::EncodedRowBytes(options_.combine, options_.hidden));
}

absl::Status Exchange::Send(int seat, const MessageHeader& header, Message message) {
  SealMessage(header, message.bytes());
  CountMessage(Direction::kSent, seat, header, message);
  return transport_->Send(group_[seat], header.phase, std::move(message));
}

void Exchange::CountMessage(Direction direction, int seat, const MessageHeader& header,
                            const Message& message) {
  meter().Add(direction, header.phase, group_[seat],
              {.payload_bytes = static_cast<int64_t>(header.payload_bytes),
               .message_bytes = static_cast<int64_t>(message.size_bytes),
               .messages = 1,
               .rows = header.rows});
}

}  // namespace ternion::comm
