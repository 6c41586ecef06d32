// A step's work, as plain data: what the router's scheduler sends down to the ranks and gets back.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"
#include "runtime/sampler.h"

namespace ternion::runtime {

using base::RankId;
enum class SequenceId : int32_t {};

// A sequence that begins with this step. Its owner reserves the pages and keeps them until it ends.
struct SequenceStart {
  SequenceId id{};
  RankId owner{};
  int32_t max_tokens = 0;  // prompt and generation together
  SamplingParams sampling;
};

// In place of a target: nothing to score.
inline constexpr int32_t kNoTarget = -1;

// Consecutive tokens of one sequence: a piece of its prompt, or the last sampled token.
struct Chunk {
  SequenceId sequence{};
  RankId owner{};
  int32_t position = 0;  // of tokens[0]
  bool sample = false;   // sample after the last token
  std::vector<int32_t> tokens;
  // To score: the token that follows each of tokens, or kNoTarget. Else empty.
  std::vector<int32_t> targets;
};

struct StepPlan {
  uint32_t step = 0;
  int32_t micro_batches = 1;      // Batch::micro_batches
  bool stop = false;              // the ranks leave their loop; nothing else is set
  std::vector<SequenceId> ended;  // finished since the last step: free their pages
  std::vector<SequenceStart> starts;
  std::vector<Chunk> chunks;

  std::string Serialize() const;
  // Checks ids, counts and ranges against the model's vocabulary and the number of ranks.
  static absl::StatusOr<StepPlan> Parse(const std::string& bytes, int64_t vocab_size,
                                        int num_ranks);
};

// What one chunk gave.
struct ChunkResult {
  SequenceId sequence{};
  int32_t token = -1;        // sampled, or -1
  uint64_t logits_hash = 0;  // over the logits of the sequence's rows so far, if wanted
  double nll = 0;            // sum over targets, nats
};

std::string SerializeResults(const std::vector<ChunkResult>& results);
absl::StatusOr<std::vector<ChunkResult>> ParseResults(const std::string& bytes);

}  // namespace ternion::runtime
