// The activation exchange of one MoE layer: rows go to the ranks of their experts and come back
// summed.
//
// Call order on every rank, for every layer:
//
//   DispatchSend(...);
//   while (const ReceivedRows* rows = DispatchRecv(...)) CombineSend(experts' outputs of *rows);
//   CombineRecv(...);
//
// Each half is nonblocking where it can be, so that work fits between them. Collective: a rank
// without rows calls too. Exactly one dispatch message goes to every peer (without rows it is a
// bare header, so no count round is needed); a combine message goes back wherever rows came from.
//
// Sums. `presum`: each rank returns one row per received row, its own experts' weighted outputs
// added in ascending expert id; the owner adds in ascending rank. Without presum (the exact wire):
// one unweighted row per (row, expert), and the owner adds weight * row in ascending expert id,
// which does not depend on where experts live.
//
// Two micro-batches are two exchanges over one transport, and their layers take turns: between
// ranks, messages of one phase keep the order in which DispatchSend and CombineSend were called.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "comm/codec.h"
#include "comm/exchange_options.h"
#include "comm/transport.h"
#include "kernels/kernels.h"

namespace ternion::comm {

using base::ExpertId;

// One chosen expert of one row, and its gate weight.
struct Route {
  ExpertId expert{};
  float weight = 0;
};

// Where the rows of this rank's batch go. A row appears at most once per destination (dedup).
struct DispatchPlan {
  struct Row {
    int32_t source = 0;       // row of the owner's batch
    int32_t first_route = 0;  // into routes; num_routes of them, ascending expert id
    int32_t num_routes = 0;   // 0: the rank has no expert of the row, and returns zeros
  };
  std::vector<int32_t> rank_begin;  // [size + 1] rows of rank r: rank_begin[r] .. rank_begin[r + 1]
  std::vector<Row> rows;            // grouped by destination rank, ascending source inside
  std::vector<Route> routes;
};

// A row that this rank's experts work on. Rows are ordered by source rank (this rank in its place),
// then as dispatched.
struct ReceivedRow {
  const int8_t* codes = nullptr;  // [hidden], unpadded, any alignment, until CombineRecv returns
  float scale = 0;
  int32_t first_route = 0;
  int32_t num_routes = 0;
};
struct ReceivedRows {
  std::vector<ReceivedRow> rows;
  std::vector<Route> routes;  // grouped by row

  void Clear();
};

struct MessageHeader;  // comm/wire.h

// Used by its rank's one thread. After an error the exchange is unusable: the rank gives up.
class Exchange {
 public:
  // `options` are valid and equal on all ranks. `transport`, `kernels` and `executor` (with
  // threads) outlive the exchange. `group`: the ranks among which it is, this one too; empty: all.
  // Plans number the ranks of a group by their seats, 0 to its size - 1.
  Exchange(const ExchangeOptions& options, Transport* transport, const kernels::Kernels* kernels,
           kernels::Executor* executor, std::vector<RankId> group = {});
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Sends this rank's rows. `plan` is copied. `codes`: the batch as the experts will multiply it.
  // All rows, here and below, lie where the executor's ops work.
  // `normed`: the fp32 rows they were quantized from, [num_rows, hidden], needed only when dispatch
  // is fp32 or bf16 (NeedsNormed). `codes` must stay until CombineRecv, `normed` until this
  // returns. `step` and `layer` are checked against the peers' headers.
  absl::Status DispatchSend(uint32_t step, uint32_t layer, const DispatchPlan& plan,
                            const kernels::QuantizedRows& codes, const float* normed);

  // The next rows for this rank's experts; null when all were handed out. Own rows and those of
  // early peers come first if they have at least `min_routes` routes (so many that to run experts
  // on them apart costs no more than to run them with the rest); else it waits for more. Valid
  // until the next call.
  //
  // `other`: the other micro-batch, which has sent its combine. Its rows are taken in meanwhile,
  // and when all are back before this exchange has rows to hand out, the list is empty: go on with
  // the other one, then call again.
  static constexpr int64_t kAllRoutes = std::numeric_limits<int64_t>::max();
  absl::StatusOr<const ReceivedRows*> DispatchRecv(int64_t min_routes = kAllRoutes,
                                                   Exchange* other = nullptr);

  // Sends back what the experts made of the rows that DispatchRecv handed out last. presum:
  // [received rows, hidden]; else [received routes, hidden], unweighted, in the order of
  // ReceivedRows::routes. Must stay until CombineRecv returns.
  absl::Status CombineSend(const float* outputs);

  // After the last CombineSend: whether all rows are back, so that CombineRecv need not wait. Takes
  // in what has arrived.
  absl::StatusOr<bool> CombineReady();

  // Adds the returned rows onto `out` [own rows, hidden].
  absl::Status CombineRecv(float* out);

  // Waits until this rank's messages have left (Transport::Flush). Before computing for long
  // without looking at the exchange.
  absl::Status Flush();

  bool NeedsNormed() const;
  int size() const { return static_cast<int>(group_.size()); }  // ranks in the group
  const ExchangeOptions& options() const { return options_; }

 private:
  enum class Stage { kDispatchSend, kDispatchRecv, kCombineSend, kCombineRecv };
  struct Peer;
  // One summand of an own row; summands are added in ascending `order`.
  struct Term {
    int32_t order = 0;  // seat, or expert id without presum
    kernels::RowTerm row;
  };

  absl::Status SendDispatchTo(int seat, const float* normed);
  absl::Status WriteRows(std::span<const DispatchPlan::Row> rows, const float* normed,
                         uint8_t* out);
  absl::Status TakeDispatch(int seat, Message message);
  void WidenCodes(Peer& peer);
  int64_t ReadyRoutes() const;
  void HandOutReady();
  void AppendRowsOf(Peer& peer);
  void AppendOwnRows();
  int SeatOf(RankId rank) const;

  void SetUnderWay(bool under_way);
  absl::Status Wait(Exchange* other);
  absl::Status Take(Arrival arrival);
  bool IsBack() const { return combine_awaited_.empty(); }

  absl::Status SendCombineTo(int seat, const float* rows);
  absl::Status TakeCombine(int seat, Message message);
  void CollectTerms();
  template <typename Visit>
  void ForEachTerm(Visit&& visit) const;

  std::span<const DispatchPlan::Row> PlannedRows(int seat) const;
  int64_t PlannedRoutes(int seat) const;
  MessageHeader HeaderOf(Phase phase, int64_t rows, int64_t routes, int64_t payload_bytes) const;
  MessageHeader CombineHeader(int64_t rows, int64_t routes) const;
  absl::Status Send(int seat, const MessageHeader& header, Message message);
  void CountOwnCombine();
  void CountMessage(Direction direction, int seat, const MessageHeader& header,
                    const Message& message);
  TrafficMeter& meter() { return transport_->traffic(); }

  const ExchangeOptions options_;
  Transport* const transport_;
  const kernels::Kernels* const kernels_;
  kernels::Executor* const executor_;
  const std::vector<RankId> group_;  // [seat]
  const int seat_;                   // this rank's

  // The layer in progress.
  Stage stage_ = Stage::kDispatchSend;  // the call that must come next
  uint32_t step_ = 0;
  uint32_t layer_ = 0;
  DispatchPlan plan_;
  kernels::QuantizedRows codes_;       // the caller's
  base::Array<float> scales_;          // [max_rows] theirs, for the host
  std::pmr::vector<int32_t> sources_;  // rows of the batch that go into one message
  ReceivedRows received_;
  std::vector<Peer> peers_;                // [seat], this rank's own among them
  std::vector<Awaited> dispatch_awaited_;  // messages that are still to come
  std::vector<Awaited> combine_awaited_;
  std::vector<Awaited> awaited_;  // what Wait looks for
  bool under_way_ = false;        // as the meter knows it

  // What CombineRecv adds: onto row i, terms_[term_begin_[i]] .. terms_[term_begin_[i + 1]] - 1.
  std::pmr::vector<int32_t> term_begin_;
  std::vector<Term> terms_;
  std::pmr::vector<kernels::RowTerm> row_terms_;
};

}  // namespace ternion::comm
