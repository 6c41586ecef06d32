// Worlds of engines over loopback, and what comes of requests to them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "experts/trace.h"
#include "nlohmann/json.hpp"
#include "runtime/engine.h"

namespace ternion::runtime {

inline constexpr char kModel[] = TERNION_SOURCE_DIR "/models/tiny";
inline constexpr char kModelA48[] = TERNION_SOURCE_DIR "/models/tiny-a48";
inline constexpr int kExperts = 16;
inline constexpr int32_t kVocab = 4096;
// Of a trace that fits the model.
inline constexpr experts::TraceShape kTraceShape = {
    .num_layers = 4, .num_tokens = 500, .num_experts = kExperts, .top_k = 2};
inline constexpr WireOptions kExact = {.exact = true};

struct WorldCase {
  int num_ranks = 1;
  std::string placement = "contiguous";
  WireOptions wire = kExact;
  int64_t max_rows = 64;
  int64_t kv_tokens = 4096;
  std::optional<kernels::KvFormat> kv = std::nullopt;
  std::string model = kModel;
  int micro_batches = 1;
  std::string trace = "";
  bool hierarchical = false;
  std::vector<int> node_of = {};  // [rank]; empty: one node
};

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const WorldCase& c, comm::Transport& transport,
                                                   kernels::Executor& executor);

// Runs `drive` with rank 0's engine; the others follow.
std::vector<absl::Status> RunEngines(const WorldCase& c,
                                     const std::function<absl::Status(Engine&)>& drive);

// What came of one request.
struct Outcome {
  std::vector<int32_t> tokens;
  uint64_t logits_hash = 0;
  double nll = 0;
  FinishReason finish = FinishReason::kNone;

  bool operator==(const Outcome&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Outcome& outcome);

// `micro_batches`, if not null: gets the numbers in which steps went.
absl::Status RunToEnd(Engine& engine, std::map<SequenceId, Outcome>& outcomes,
                      std::set<int>* micro_batches = nullptr);

// The outcomes of all requests, submitted together, in their order.
std::vector<Outcome> Generate(const WorldCase& c, const std::vector<Request>& requests);

Request RandomPrompt(size_t size, int32_t max_new_tokens, uint32_t seed);

// Sixteen prompts of 1 to 60 tokens; the first is of 23.
std::vector<Request> ManyPrompts();

// A placement file's text: expert e is on the rank, or the ranks, ranks_of(e).
std::string PlacementJson(const std::function<nlohmann::json(int)>& ranks_of);

}  // namespace ternion::runtime
