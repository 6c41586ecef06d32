#include "runtime/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "runtime/kv_cache.h"

namespace ternion::runtime {

Scheduler::Scheduler(const SchedulerLimits& limits)
    : limits_(limits),
      free_pages_(limits.num_ranks, limits.pages_per_rank),
      sequences_on_(limits.num_ranks, 0) {}

int64_t Scheduler::MaxTokens(const Request& request) const {
  const int64_t wanted = static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens;
  return std::min(wanted, limits_.max_positions);
}

absl::StatusOr<SequenceId> Scheduler::Submit(Request request) {
  const int64_t prompt_tokens = static_cast<int64_t>(request.prompt.size());
  if (prompt_tokens == 0) return absl::InvalidArgumentError("the prompt is empty");
  for (int32_t token : request.prompt) {
    if (token < 0 || token >= limits_.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("the prompt holds token id ", token,
                                                     "; the vocabulary ends at ",
                                                     limits_.vocab_size - 1));
    }
  }
  if (prompt_tokens > limits_.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", prompt_tokens,
                                                   " tokens; the model has ", limits_.max_positions,
                                                   " positions"));
  }
  if (request.score ? request.max_new_tokens != 0 : request.max_new_tokens <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_new_tokens is ", request.max_new_tokens,
                     request.score ? "; it must be 0 to score" : "; it must be above 0"));
  }
  const int64_t budget = limits_.pages_per_rank * kernels::kPageTokens;
  if (MaxTokens(request) > budget) {
    return absl::InvalidArgumentError(
        absl::StrCat("the prompt (", prompt_tokens, " tokens) and its generation need ",
                     MaxTokens(request), " tokens of KV cache; a rank has ", budget));
  }
  const SequenceId id{next_id_++};
  waiting_.emplace_back(id, std::move(request));
  return id;
}

void Scheduler::StartWaiting(StepPlan& plan) {
  while (!waiting_.empty()) {
    auto& [id, request] = waiting_.front();
    const auto most_free = std::max_element(free_pages_.begin(), free_pages_.end());
    const int rank = static_cast<int>(most_free - free_pages_.begin());
    const int64_t max_tokens = MaxTokens(request);
    const int64_t pages = KvCache::PagesFor(max_tokens);
    // Every running sequence needs a row of its own to decode.
    if (pages > *most_free || sequences_on_[rank] >= limits_.max_rows) return;
    free_pages_[rank] -= pages;
    ++sequences_on_[rank];
    plan.starts.push_back({id, RankId{rank}, static_cast<int32_t>(max_tokens), request.sampling});
    Sequence& sequence = running_[id];
    sequence.tokens = request.prompt;
    sequence.request = std::move(request);
    sequence.owner = RankId{rank};
    sequence.pages = pages;
    waiting_.pop_front();
  }
}

void Scheduler::AddChunk(SequenceId id, Sequence& sequence, int64_t max_tokens, StepPlan& plan) {
  const int64_t size = static_cast<int64_t>(sequence.tokens.size());
  const int64_t count = std::min(size - sequence.computed, max_tokens);
  if (count <= 0) return;
  const auto begin = sequence.tokens.begin() + sequence.computed;
  Chunk chunk;
  chunk.sequence = id;
  chunk.owner = sequence.owner;
  chunk.position = static_cast<int32_t>(sequence.computed);
  chunk.tokens.assign(begin, begin + count);
  if (sequence.request.score) {
    chunk.targets.assign(begin + 1, std::min(begin + count + 1, sequence.tokens.end()));
    chunk.targets.resize(count, kNoTarget);  // the last token has no successor
  } else {
    chunk.sample = sequence.computed + count == size;
  }
  sequence.in_flight = count;
  plan.chunks.push_back(std::move(chunk));
}

StepPlan Scheduler::Next() {
  StepPlan plan;
  plan.step = next_step_++;
  plan.ended = std::exchange(ended_, {});
  StartWaiting(plan);
  std::vector<int64_t> rows(limits_.num_ranks, limits_.max_rows);
  const auto add = [&](bool decoding) {
    for (auto& [id, sequence] : running_) {
      const bool decodes =
          sequence.computed >= static_cast<int64_t>(sequence.request.prompt.size());
      if (decodes != decoding) continue;
      int64_t& left = rows[base::Index(sequence.owner)];
      AddChunk(id, sequence, left, plan);
      left -= sequence.in_flight;
    }
  };
  add(/*decoding=*/true);
  add(/*decoding=*/false);
  return plan;
}

int64_t Scheduler::PromptTokensOf(const Chunk& chunk) const {
  const int64_t prompt = static_cast<int64_t>(running_.at(chunk.sequence).request.prompt.size());
  const int64_t count = static_cast<int64_t>(chunk.tokens.size());
  return std::clamp<int64_t>(prompt - chunk.position, 0, count);
}

FinishReason Scheduler::Advance(Sequence& sequence, const ChunkResult& result) {
  const Request& request = sequence.request;
  sequence.computed += std::exchange(sequence.in_flight, 0);
  const int64_t size = static_cast<int64_t>(sequence.tokens.size());
  if (request.score) return sequence.computed == size ? FinishReason::kLength : FinishReason::kNone;
  if (sequence.computed < size) return FinishReason::kNone;  // more of the prompt to come
  sequence.tokens.push_back(result.token);
  const bool stop = std::find(request.stop_ids.begin(), request.stop_ids.end(), result.token) !=
                    request.stop_ids.end();
  if (stop) return FinishReason::kStop;
  const bool full = size + 1 >= MaxTokens(request);
  return full ? FinishReason::kLength : FinishReason::kNone;
}

absl::StatusOr<std::vector<SequenceEvent>> Scheduler::Commit(
    const std::vector<ChunkResult>& results) {
  std::vector<SequenceEvent> events;
  for (const ChunkResult& result : results) {
    const auto found = running_.find(result.sequence);
    if (found == running_.end() || found->second.in_flight == 0) {
      return absl::InternalError(absl::StrCat("a rank sent a result for sequence ",
                                              base::Index(result.sequence), ", which did not run"));
    }
    Sequence& sequence = found->second;
    const size_t tokens_before = sequence.tokens.size();
    const FinishReason finish = Advance(sequence, result);
    const bool generated = sequence.tokens.size() > tokens_before;
    if (generated && (result.token < 0 || result.token >= limits_.vocab_size)) {
      return absl::InternalError(
          absl::StrCat("a rank sampled token ", result.token, ", which is not in the vocabulary"));
    }
    events.push_back(
        {result.sequence, generated ? result.token : -1, finish, result.logits_hash, result.nll});
    if (finish == FinishReason::kNone) continue;
    free_pages_[base::Index(sequence.owner)] += sequence.pages;
    --sequences_on_[base::Index(sequence.owner)];
    ended_.push_back(result.sequence);
    running_.erase(found);
  }
  for (const auto& [id, sequence] : running_) {
    if (sequence.in_flight == 0) continue;
    return absl::InternalError(
        absl::StrCat("no rank sent a result for sequence ", base::Index(id)));
  }
  return events;
}

}  // namespace ternion::runtime
