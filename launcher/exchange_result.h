// What the ranks of `bench exchange` saw of a case, put together, and figures made of it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/transport.h"
#include "launcher/exchange_case.h"
#include "launcher/report.h"

namespace ternion::launcher {

// A case as rank 0 knows it once all ranks have told.
struct CaseResult {
  WireCase wire;
  int64_t tokens_per_rank = 0;
  int iterations = 0;
  bool verified = true;
  uint64_t output_hash = 0;
  std::vector<double> dispatch_us, combine_us, total_us;  // [iteration], the slowest rank's
  Json phases = Json::object();                           // dispatch, combine: sums over ranks
  std::vector<std::vector<int64_t>> sent_bytes;           // [from][to] message bytes
  std::vector<std::vector<int64_t>> received_bytes;       // [at][from]
  int64_t inter_node_bytes = 0;
  int64_t nic_sent_bytes = 0, nic_received_bytes = 0;
  std::vector<int64_t> peak_memory_bytes;  // by rank, so far
  double remote_ranks = 0;                 // m: other ranks that hold experts of a token
  double remote_routes = 0;                // experts of a token on other ranks
  // Per token and layer: of each layer's dispatch and each combine, what crosses the link of the
  // busiest node (on one node, rank) in its busier direction.
  double bottleneck_bytes = 0;

  // Per token and layer.
  double PerToken(double bytes) const {
    return bytes / static_cast<double>(tokens_per_rank * sent_bytes.size() * iterations);
  }
  double Sum(const char* level) const {
    return phases["dispatch"][level].get<double>() + phases["combine"][level].get<double>();
  }
  double MessageBytes() const { return PerToken(Sum("message_bytes")); }
  double PayloadBytes() const { return PerToken(Sum("payload_bytes")); }
  double InterNodeBytes() const { return PerToken(static_cast<double>(inter_node_bytes)); }
  double NicBytes() const { return PerToken(static_cast<double>(nic_sent_bytes)); }
};

// What a rank tells rank 0 of its run, and what rank 0 makes of all ranks' `texts`. InvalidArgument
// when one is malformed.
std::string RunToText(const CaseRun& run, const comm::Transport& transport);
absl::StatusOr<CaseResult> CombineRuns(const std::vector<std::string>& texts, const WireCase& wire,
                                       int64_t tokens_per_rank, int num_layers);

// The wire that others are compared with: int4 both ways.
inline const WireCase kNarrowest = {comm::RowFormat::kInt4, comm::RowFormat::kInt4};

// The result of a wire at so many tokens, or null.
const CaseResult* Find(const std::vector<CaseResult>& results, const WireCase& wire,
                       int64_t tokens);

// B_min of a token and layer: codes, scales, and an id and a gate weight for each expert elsewhere.
double FloorBytes(const CaseResult& result, int64_t hidden);

// Wires of other systems that this program does not speak: their sizes, on this trace.
struct SizedWire {
  const char* name;
  bool dedup;
  double (*dispatch)(double hidden);  // bytes of a row
  double (*combine)(double hidden);
};
std::span<const SizedWire> SizedWires();
// Per token and layer; `of`: a case of the same tokens.
double PayloadBytesOf(const SizedWire& wire, const CaseResult& of, int64_t hidden);

// A percentile needs that many exchanges: of fewer, the 99th is the largest.
inline constexpr int kSamplesOfP99 = 100;

// What a wire costs: its change of bits per byte in percent, from reports of `eval --ladder`; none
// where no report has it, or rows are rounded at other places than there.
std::optional<double> QualityChange(const std::vector<Json>& ladders, const WireCase& wire);

// Pairs of cases that differ in one switch, and what it saves (docs/json.md).
Json FactorsJson(const std::vector<CaseResult>& results, int64_t tokens);
Json CaseToJson(const CaseResult& result, int64_t hidden, const std::vector<Json>& ladders);

}  // namespace ternion::launcher
