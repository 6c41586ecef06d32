// Decides what every rank does in the next step. Lives in the router; plain logic, no I/O.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/batch.h"

namespace ternion::runtime {

// What a user asks for.
struct Request {
  std::vector<int32_t> prompt;  // not empty
  int32_t max_new_tokens = 0;   // 0 only when scoring
  SamplingParams sampling;
  std::vector<int32_t> stop_ids;  // generation ends after one of these
  bool score = false;             // no generation: sum the negative log likelihood of prompt[1..]
};

enum class FinishReason : uint8_t { kNone, kStop, kLength };

// News of one sequence from one step.
struct SequenceEvent {
  SequenceId sequence{};
  int32_t token = -1;  // generated in this step, or -1
  FinishReason finish = FinishReason::kNone;
  uint64_t logits_hash = 0;  // over all steps so far
  double nll = 0;            // scoring: of this step's tokens
};

struct SchedulerLimits {
  int num_ranks = 1;
  int64_t max_rows = 0;        // rows of one rank in one step
  int64_t pages_per_rank = 0;  // KV pages
  int64_t max_positions = 0;   // of the model
  int64_t vocab_size = 0;
};

// Continuous batching with chunked prefill. A sequence belongs to one rank, the one with the most
// free pages when it starts, and reserves its pages up front, so that it never runs out. In a step,
// running sequences decode first; what is left of a rank's rows goes to prompts, oldest first.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerLimits& limits);

  // Queues a request. InvalidArgument: empty prompt, a token outside the vocabulary, nothing to
  // generate, more tokens than the model has positions or a rank has KV pages.
  absl::StatusOr<SequenceId> Submit(Request request);

  // The next step; its chunks are empty when there is nothing to do.
  StepPlan Next();

  // Takes in what the ranks sent for the last plan. Internal error on a result that was not asked
  // for, that is missing, or whose token is none.
  absl::StatusOr<std::vector<SequenceEvent>> Commit(const std::vector<ChunkResult>& results);

  // How many of a chunk's tokens are its sequence's prompt (the rest was generated).
  int64_t PromptTokensOf(const Chunk& chunk) const;

  bool idle() const { return waiting_.empty() && running_.empty(); }

 private:
  struct Sequence {
    Request request;
    RankId owner{};
    int64_t pages = 0;
    std::vector<int32_t> tokens;  // prompt and generated
    int64_t computed = 0;         // tokens in the KV cache
    int64_t in_flight = 0;        // tokens of the current plan
  };

  void StartWaiting(StepPlan& plan);
  void AddChunk(SequenceId id, Sequence& sequence, int64_t max_tokens, StepPlan& plan);
  int64_t MaxTokens(const Request& request) const;
  FinishReason Advance(Sequence& sequence, const ChunkResult& result);

  const SchedulerLimits limits_;
  int32_t next_id_ = 0;
  uint32_t next_step_ = 0;
  std::deque<std::pair<SequenceId, Request>> waiting_;
  std::map<SequenceId, Sequence> running_;  // by age
  std::vector<SequenceId> ended_;
  std::vector<int64_t> free_pages_;    // [num_ranks]
  std::vector<int64_t> sequences_on_;  // [num_ranks]
};

}  // namespace ternion::runtime
