#include "runtime/batch.h"

#include "base/bytes.h"
#include "base/status.h"

namespace ternion::runtime {
namespace {

bool InRange(const std::vector<int32_t>& tokens, int32_t lowest, int64_t vocab_size) {
  for (int32_t token : tokens) {
    if (token < lowest || token >= vocab_size) return false;
  }
  return true;
}

bool IsRank(RankId rank, int num_ranks) {
  return base::Index(rank) >= 0 && base::Index(rank) < num_ranks;
}

}  // namespace

std::string StepPlan::Serialize() const {
  base::ByteWriter writer;
  writer.Put(step);
  writer.Put(micro_batches);
  writer.Put(static_cast<uint8_t>(stop));
  writer.PutVector(ended);
  writer.PutVector(starts);
  writer.Put(static_cast<uint32_t>(chunks.size()));
  for (const Chunk& chunk : chunks) {
    writer.Put(chunk.sequence);
    writer.Put(chunk.owner);
    writer.Put(chunk.position);
    writer.Put(static_cast<uint8_t>(chunk.sample));
    writer.PutVector(chunk.tokens);
    writer.PutVector(chunk.targets);
  }
  return writer.Take();
}

absl::StatusOr<StepPlan> StepPlan::Parse(const std::string& bytes, int64_t vocab_size,
                                         int num_ranks) {
  base::ByteReader reader(bytes);
  StepPlan plan;
  plan.step = reader.Get<uint32_t>();
  plan.micro_batches = reader.Get<int32_t>();
  plan.stop = reader.Get<uint8_t>() != 0;
  plan.ended = reader.GetVector<SequenceId>();
  plan.starts = reader.GetVector<SequenceStart>();
  const uint32_t num_chunks = reader.Get<uint32_t>();
  bool valid = plan.micro_batches == 1 || plan.micro_batches == 2;
  for (uint32_t i = 0; i < num_chunks && reader.ok(); ++i) {
    Chunk chunk;
    chunk.sequence = reader.Get<SequenceId>();
    chunk.owner = reader.Get<RankId>();
    chunk.position = reader.Get<int32_t>();
    chunk.sample = reader.Get<uint8_t>() != 0;
    chunk.tokens = reader.GetVector<int32_t>();
    chunk.targets = reader.GetVector<int32_t>();
    valid = valid && IsRank(chunk.owner, num_ranks) && chunk.position >= 0 &&
            !chunk.tokens.empty() && InRange(chunk.tokens, 0, vocab_size) &&
            InRange(chunk.targets, kNoTarget, vocab_size) &&
            (chunk.targets.empty() || chunk.targets.size() == chunk.tokens.size());
    plan.chunks.push_back(std::move(chunk));
  }
  for (const SequenceStart& start : plan.starts) {
    valid = valid && IsRank(start.owner, num_ranks) && start.max_tokens > 0;
  }
  if (!reader.ok() || !reader.AtEnd() || !valid) {
    return absl::InvalidArgumentError("rank 0 sent a malformed step plan");
  }
  return plan;
}

std::string SerializeResults(const std::vector<ChunkResult>& results) {
  base::ByteWriter writer;
  writer.PutVector(results);
  return writer.Take();
}

absl::StatusOr<std::vector<ChunkResult>> ParseResults(const std::string& bytes) {
  base::ByteReader reader(bytes);
  std::vector<ChunkResult> results = reader.GetVector<ChunkResult>();
  if (!reader.ok() || !reader.AtEnd()) return absl::InvalidArgumentError("malformed step results");
  return results;
}

}  // namespace ternion::runtime
