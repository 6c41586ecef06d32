// One line of `bench exchange`: a way of exchanging rows, run and checked on a routing trace.
#pragma once

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/all_to_all.h"
#include "comm/exchange.h"
#include "experts/hierarchical_exchange.h"
#include "experts/placement.h"
#include "experts/routing.h"
#include "experts/trace.h"
#include "launcher/nic.h"
#include "launcher/world.h"

namespace ternion::launcher {

// Which rows travel.
enum class RowSet {
  kOncePerRank,    // a token goes once to every rank that has an expert of it (dedup)
  kOncePerExpert,  // ... once for every expert
  kToAllRanks,     // ... to all ranks: allgather, and a sum over all of them on the way back
};

struct WireCase {
  comm::RowFormat dispatch = comm::RowFormat::kBf16;
  comm::RowFormat combine = comm::RowFormat::kBf16;
  RowSet rows = RowSet::kOncePerRank;
  bool presum = true;
  std::string placement = "contiguous";
  bool hierarchical = false;  // once per node, then inside
  bool all_to_all = false;    // all messages of a phase at once, by MPI_Ialltoallv

  std::string Name() const;  // "int4/int4, no dedup"
};

// What all cases of one report share. Outlives them.
struct ExchangeSetup {
  int64_t hidden = 0;
  int64_t tokens_per_rank = 0;
  const experts::RoutingTrace* trace = nullptr;
  const experts::NodeLayout* layout = nullptr;  // for hierarchical wires
  int num_layers = 0;                           // of the trace, used in turn
  // Whose bytes this rank counts: its node's, on one rank each.
  std::vector<std::string> interfaces;
};

// Message bytes that a rank sends in one layer: [peer] by phase.
struct LayerBytes {
  std::vector<int64_t> dispatch, combine;
};

// What one rank saw of a case. Times by iteration, in microseconds; bytes over all iterations.
struct CaseRun {
  bool verified = false;     // before and after the timing
  uint64_t output_hash = 0;  // of the verified rows
  std::vector<double> dispatch_us;
  std::vector<double> combine_us;
  // Of one round over the layers: (token, rank) and (token, expert) pairs on other ranks.
  int64_t remote_visits = 0;
  int64_t remote_routes = 0;
  comm::TrafficMeter traffic;
  std::vector<LayerBytes> layer_bytes;  // [layer] of one exchange
  NicCount nic;
};

// A case on this rank. As in a model, rows lie where the kernels work; what is expected of them is
// computed on the host.
class ExchangeCase {
 public:
  ExchangeCase(const WireCase& wire, const experts::Placement& placement,
               const ExchangeSetup& setup, World& world);

  // Collective. Exchanges every layer and compares all sums with those of a serial computation,
  // times exchanges, one layer each, for about `seconds` (at least kMinIterations, at most
  // kMaxIterations of them), and compares once more. Errors of the exchange.
  static constexpr int kMinIterations = 20;
  static constexpr int kMaxIterations = 1000;
  absl::StatusOr<CaseRun> Run(double seconds);

 private:
  // One round over the layers.
  struct Round {
    bool equal = true;  // all sums
    uint64_t output_hash = 0;
    std::vector<LayerBytes> layer_bytes;
  };
  absl::StatusOr<Round> Verify();
  absl::StatusOr<int> ChooseIterations(double seconds);
  void AddPlan(comm::DispatchPlan plan);
  absl::Status Time(int iterations, CaseRun* run);
  LayerBytes SentBytes() const;
  absl::Status Exchange(int layer, bool fresh_outputs, CaseRun* run);
  absl::Status ExchangeByNode(int layer, bool fresh_outputs, CaseRun* run);
  experts::GateChoice ChoiceOf(int layer) const;
  absl::Status RunExperts(const comm::ReceivedRows& received, float* outputs);
  void MakeRows();
  absl::StatusOr<const float*> SumsOnHost();
  // One row that is added onto an own row.
  struct Summand {
    int32_t source = 0;  // own row
    int32_t order = 0;   // ascending in the sum
    int32_t place = 0;   // the rank (or node) that returns it
    float factor = 0;    // of the row's codes, times their scale
    float weight = 0;    // by which the owner multiplies it
  };
  std::vector<Summand> SummandsOf(const comm::DispatchPlan& plan) const;
  std::vector<float> Expected(int layer);

  const WireCase wire_;
  const ExchangeSetup& setup_;
  World& world_;
  comm::AllToAllTransport collective_;  // used when the wire says so
  comm::Transport& transport_;
  comm::Exchange exchange_;
  std::unique_ptr<experts::HierarchicalExchange> hierarchical_;  // in place of it
  std::vector<comm::DispatchPlan> plans_;                        // [layer]
  std::vector<std::vector<int32_t>> ids_;  // [layer] of own tokens, [tokens, top_k]
  std::vector<float> weights_;             // [tokens, top_k]
  // In the executor's memory.
  base::Array<float> rows_;         // [tokens, hidden] as if normed
  kernels::QuantizedBuffer codes_;  // the same, quantized
  base::Array<float> out_;          // [tokens, hidden]
  base::Array<float> outputs_;      // of the experts, for received rows
  // For RunExperts, in staging: some received rows.
  std::pmr::vector<const int8_t*> row_codes_;
  std::pmr::vector<float> row_scales_;
  kernels::QuantizedBuffer gathered_;
  // On the host, for Expected.
  kernels::Executor host_executor_;
  const runtime::RankResources host_;      // a CPU's kernels
  kernels::QuantizedBuffer host_codes_;    // as codes_
  kernels::QuantizedBuffer remote_codes_;  // as other ranks see them: bf16 dispatch rounds first
  base::Array<float> host_out_;            // out_ in staging; empty if the host reaches that
  CaseRun run_;
  uint32_t step_ = 0;
};

}  // namespace ternion::launcher
