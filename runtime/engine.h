// One rank's engine: everything from requests down to kernels.
//
// On rank 0 the router's library drives it: Submit requests, Step until idle, Stop. The other ranks
// Follow. All ranks walk through the same steps: rank 0 plans, sends the plan down, every rank runs
// its sequences' rows (and its experts on everybody's rows), and results come up.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "experts/placement.h"
#include "runtime/kv_cache.h"
#include "runtime/micro_batches.h"
#include "runtime/model.h"
#include "runtime/scheduler.h"

namespace ternion::runtime {

struct EngineOptions {
  std::string model_directory;
  std::string placement;  // "contiguous", "balanced", "local", or the path of a placement file
  std::string trace;      // routing trace (docs/trace.md) that "balanced" and "local" follow
  WireOptions wire;
  std::optional<kernels::KvFormat> kv = std::nullopt;  // none: the model's own (kv_bits)
  int64_t max_rows = 512;                              // of one rank in one step
  bool hierarchical = false;                           // ModelOptions::hierarchical
  int micro_batches = 0;     // Batch::micro_batches; 0: chosen step by step
  int64_t kv_tokens = 0;     // capacity of one rank's KV cache; 0: DefaultKvBytes
                             // share, at most kMaxDefaultKvTokens
  bool hash_logits = false;  // SequenceEvent::logits_hash; else 0
};
inline constexpr int64_t kMaxDefaultKvTokens = 1 << 18;

// What one step did.
struct StepReport {
  std::vector<SequenceEvent> events;
  int64_t prompt_tokens = 0;  // prompt tokens processed
  int64_t generated_tokens = 0;
  int micro_batches = 1;  // in which the rows went through the layers
};

// The logits of one row, on the rank that owns the sequence.
using LogitsSink =
    std::function<void(SequenceId sequence, int32_t position, std::span<const float> logits)>;

// The experts that one row takes in `layer`, distinct, on the rank that owns the sequence. Layers
// without experts are not counted; a row passes the others in their order.
using RoutingSink = std::function<void(SequenceId sequence, int32_t position, int layer,
                                       std::span<const int32_t> experts)>;

class Engine {
 public:
  // Collective: loads this rank's share. An error on any rank is the same error on all of them.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                        const RankResources& resources,
                                                        const LoadProgress& progress);

  // Rank 0. See Scheduler::Submit.
  absl::StatusOr<SequenceId> Submit(Request request);
  // Rank 0, collective with Follow: one step, and what came of it. Nothing happens when idle.
  absl::StatusOr<StepReport> Step();
  bool idle() const { return scheduler_->idle(); }
  // Rank 0: ends Follow on the other ranks.
  absl::Status Stop();

  // Other ranks: takes part in steps until rank 0 stops.
  absl::Status Follow();

  // Collective, every rank with the same arguments, while nothing is submitted and nobody follows:
  // other precisions over the same weights, as of an engine created with them. The KV cache keeps
  // its capacity in tokens, traffic counts from 0, and sequence ids start at 0 again. An error that
  // names the precisions leaves the engine as it was; after running out of memory it is unusable.
  absl::Status Reconfigure(const WireOptions& wire, kernels::KvFormat kv);

  // Called for every row of a scored sequence that this rank owns, in order; each rank may set one.
  // The same submissions to an engine just created or reconfigured have the same owners.
  void set_logits_sink(LogitsSink sink) { logits_sink_ = std::move(sink); }

  // Called for every row that this rank owns and every layer with experts; each rank may set one.
  void set_routing_sink(RoutingSink sink);

  const ModelConfig& config() const { return config_; }
  const Model& model() const { return *model_; }
  const WireOptions& wire() const { return wire_; }  // dispatch is set
  kernels::KvFormat kv_format() const { return kv_format_; }
  // What this rank's messages came to since the engine was made or reconfigured.
  const comm::TrafficMeter& traffic() const { return resources_.transport->traffic(); }
  int num_ranks() const { return resources_.transport->size(); }
  int64_t kv_tokens() const { return kv_cache_->num_pages() * kernels::kPageTokens; }
  int64_t kv_bytes() const { return kv_cache_->bytes(); }
  int64_t max_rows() const { return options_.max_rows; }  // of one rank in one step

 private:
  // A sequence that this rank owns.
  struct LocalSequence {
    KvPages pages;
    SamplingParams sampling;
    uint64_t logits_hash = 0;
  };

  // A row of the batch whose logits are needed.
  struct LogitRow {
    const Chunk* chunk = nullptr;
    int32_t index = 0;  // into the chunk's tokens
    int32_t batch_row = 0;
    int32_t result = 0;  // into this step's results
  };

  Engine(ModelConfig config, const RankResources& resources, const EngineOptions& options);

  static absl::StatusOr<std::unique_ptr<Engine>> CreateLocal(const EngineOptions& options,
                                                             const RankResources& resources,
                                                             const LoadProgress& progress);
  absl::Status CheckReconfigure(const WireOptions& wire, kernels::KvFormat kv) const;
  void MakeCache(kernels::KvFormat kv, int64_t kv_tokens);
  absl::StatusOr<std::vector<ChunkResult>> ExecuteEverywhere(const StepPlan& plan);
  absl::Status Prepare(const StepPlan& plan);
  absl::StatusOr<std::vector<ChunkResult>> Execute(const StepPlan& plan);
  absl::Status SampleRows(std::span<const LogitRow> group, std::vector<ChunkResult>& results);
  absl::Status RunHead(std::vector<ChunkResult>& results);
  void TakeLogits(const LogitRow& row, std::span<const float> logits, ChunkResult& result);

  const ModelConfig config_;
  const RankResources resources_;
  const EngineOptions options_;
  WireOptions wire_;
  kernels::KvFormat kv_format_ = kernels::KvFormat::kBf16;
  std::unique_ptr<KvCache> kv_cache_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Scheduler> scheduler_;  // used on rank 0, as is the next
  MicroBatchChooser micro_batches_;
  std::map<SequenceId, LocalSequence> sequences_;
  LogitsSink logits_sink_;
  Batch batch_;
  std::vector<SequenceId> row_sequences_;  // of the batch's rows
  std::vector<LogitRow> logit_rows_;
};

}  // namespace ternion::runtime
