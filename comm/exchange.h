// The activation exchange of one MoE layer: rows go to the ranks of their experts and come back summed.
//
// Call order on every rank, for every layer: DispatchSend, DispatchRecv, (experts run), CombineSend,
// CombineRecv. Each half is nonblocking where it can be, so that work fits between them. Collective: a
// rank without rows calls too. Exactly one dispatch message goes to every peer (without rows it is a bare
// header, so no count round is needed); a combine message goes back wherever rows came from.
//
// Sums. `presum`: each rank returns one row per received row, its own experts' weighted outputs added in
// ascending expert id; the owner adds in ascending rank. Without presum (the exact wire): one unweighted
// row per (row, expert), and the owner adds weight * row in ascending expert id, which does not depend on
// where experts live.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "comm/codec.h"
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
    int32_t num_routes = 0;
  };
  std::vector<int32_t> rank_begin;  // [size + 1] rows of destination rank r: rank_begin[r] .. rank_begin[r+1]
  std::vector<Row> rows;            // grouped by destination rank, ascending source inside
  std::vector<Route> routes;
};

// A row that this rank's experts work on. Rows are ordered by source rank (this rank in its place), then
// as dispatched.
struct ReceivedRow {
  const int8_t* codes = nullptr;  // [hidden], unpadded, any alignment; valid until CombineRecv returns
  float scale = 0;
  int32_t first_route = 0;
  int32_t num_routes = 0;
};
struct ReceivedRows {
  std::vector<ReceivedRow> rows;
  std::vector<Route> routes;  // grouped by row
};

struct ExchangeOptions {
  RowFormat dispatch = RowFormat::kInt8;
  RowFormat combine = RowFormat::kBf16;
  bool presum = true;     // false only with combine == kFp32: the exact wire
  int act_bits = 8;       // width the model quantizes activations to: 8 or 4
  int64_t hidden = 0;
  int64_t max_rows = 0;   // own rows of one step, at most
  int top_k = 0;          // routes of one row, at most
  int num_experts = 0;    // ids from the wire must be below
};

class Exchange {
 public:
  // `transport`, `kernels` and `executor` outlive the exchange.
  Exchange(const ExchangeOptions& options, Transport* transport, const kernels::Kernels* kernels,
           kernels::Executor* executor);

  // Sends this rank's rows. `codes`: the batch as the experts will multiply it. `normed`: the fp32 rows
  // they were quantized from, [num_rows, hidden], needed only when dispatch is fp32 or bf16 (NeedsNormed).
  // Both must stay until CombineRecv. `step` and `layer` are checked against the peers' headers.
  absl::Status DispatchSend(uint32_t step, uint32_t layer, const DispatchPlan& plan,
                            const kernels::QuantizedRows& codes, const float* normed);

  // Rows for this rank's experts, from all ranks. Valid until CombineRecv returns.
  absl::StatusOr<const ReceivedRows*> DispatchRecv();

  // Sends the experts' outputs back. presum: [received rows, hidden]; else [received routes, hidden],
  // unweighted, in the order of ReceivedRows::routes. Must stay until CombineRecv returns.
  absl::Status CombineSend(const float* outputs);

  // Adds the returned rows onto `out` [own rows, hidden].
  absl::Status CombineRecv(float* out);

  bool NeedsNormed() const;
  const ExchangeOptions& options() const { return options_; }
};

}  // namespace ternion::comm
