// `ternion bench exchange`: bytes and time of one MoE layer's exchange, wire by wire.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launcher/world.h"

namespace ternion::launcher {

struct BenchExchangeOptions {
  WorldOptions world;
  std::string shape;  // sets hidden, experts and top_k (shapes.h); each can be given by itself
  int64_t hidden = 0;
  int experts = 0;
  int top_k = 0;
  std::string trace;                // a file (docs/trace.md); else a synthetic one:
  std::string routing = "uniform";  // or zipf
  double zipf_exponent = 1;
  uint64_t seed = 0;
  std::string save_trace;                         // where the trace is written, to be used again
  std::vector<int64_t> tokens = {1, 8, 32, 128};  // per rank
  double seconds = 0.5;                           // of timing, per case
  std::vector<std::string> ladders;  // JSON of `eval --ladder`, for what a wire costs in quality
  std::string json;
  std::string matrix;  // CSV: from rank (line) to rank (column), of int4/int4, over the largest
};

// Collective. Prints a table for each number of tokens and the factors by which bytes and time
// change; writes all of it as JSON (docs/json.md), also what was measured before an error.
// InvalidArgument, before anything is timed: no shape, a trace of another shape or not the same on
// all ranks, a report that cannot be written, more memory than there is. DataLoss, after
// everything: sums of a wire were wrong.
absl::Status BenchExchange(const BenchExchangeOptions& options, World& world);

}  // namespace ternion::launcher
