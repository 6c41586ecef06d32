// Routing traces: which experts each token took in each layer.
//
// Placements are made from them, and exchanges are measured on them: real ones are recorded by
// `ternion eval --record-trace`, synthetic ones follow from a seed. Bytes on disk: docs/trace.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"

namespace ternion::experts {

using base::ExpertId;

struct TraceShape {
  int num_layers = 0;
  int64_t num_tokens = 0;  // below 2^31
  int num_experts = 0;     // at most 65536: ids have 16 bits
  int top_k = 0;           // experts per token, at most num_experts

  bool operator==(const TraceShape&) const = default;
};

struct RoutingTrace {
  TraceShape shape;
  std::vector<uint16_t> ids;  // [num_layers, num_tokens, top_k], ascending inside a token

  std::span<const uint16_t> ExpertsOf(int layer, int64_t token) const {
    return std::span(ids).subspan((layer * shape.num_tokens + token) * shape.top_k, shape.top_k);
  }
  // XXH3-64 over counts and ids, as they lie in a file: names the trace in a report.
  uint64_t Hash() const;
};

// InvalidArgument or DataLoss that names the file and the field.
absl::StatusOr<RoutingTrace> LoadTrace(const std::string& path);
// The file appears whole or not at all. `trace` is valid: its ids are of its shape.
absl::Status SaveTrace(const RoutingTrace& trace, const std::string& path);

// Every set of top_k experts is equally likely. InvalidArgument when a count is out of range.
absl::StatusOr<RoutingTrace> UniformTrace(uint64_t seed, const TraceShape& shape);

// A token draws top_k distinct experts one after another; the n-th most popular expert of a layer
// has weight n^-exponent, and which one that is depends on seed and layer. `exponent` 0 (uniform)
// to 8. The same on every machine.
absl::StatusOr<RoutingTrace> ZipfTrace(uint64_t seed, double exponent, const TraceShape& shape);

}  // namespace ternion::experts
