#include "runtime/engine.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <new>
#include <utility>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "experts/balance.h"
#include "experts/locality.h"
#include "experts/trace.h"
#include "runtime/memory_share.h"
#include "xxhash.h"

namespace ternion::runtime {
namespace {

using experts::Placement;

absl::Status CheckTraceCount(absl::string_view what, int64_t in_trace, int64_t in_model) {
  if (in_trace == in_model) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the trace has ", in_trace, " ", what, ", the model ", in_model));
}

absl::StatusOr<experts::RoutingTrace> LoadTraceOf(const ModelConfig& config,
                                                  const std::string& path) {
  TERNION_ASSIGN_OR_RETURN(experts::RoutingTrace trace, experts::LoadTrace(path));
  const experts::TraceShape& shape = trace.shape;
  absl::Status fits =
      CheckTraceCount("layers with experts", shape.num_layers, config.num_expert_layers());
  fits.Update(CheckTraceCount("experts", shape.num_experts, config.num_experts));
  fits.Update(CheckTraceCount("experts per token", shape.top_k, config.top_k));
  TERNION_RETURN_IF_ERROR(base::Annotate(fits, path));
  return trace;
}

absl::StatusOr<Placement> MakePlacement(const EngineOptions& options, const ModelConfig& config,
                                        int num_ranks) {
  const std::string& name = options.placement;
  if (name == "contiguous") {
    return Placement::Contiguous(config.num_expert_layers(), config.num_experts, num_ranks);
  }
  if (!config.moe()) {
    return absl::InvalidArgumentError(
        "a placement other than contiguous needs a model with experts");
  }
  if (name == "balanced" || name == "local") {
    TERNION_ASSIGN_OR_RETURN(const experts::RoutingTrace trace, LoadTraceOf(config, options.trace));
    return name == "local" ? experts::LocalPlacement(trace, num_ranks)
                           : experts::BalancedPlacement(trace, num_ranks);
  }
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(name));
  absl::StatusOr<Placement> placement =
      Placement::FromJson(text, config.num_expert_layers(), config.num_experts, num_ranks);
  if (!placement.ok()) return base::Annotate(placement.status(), name);
  return placement;
}

// The ranks of this node share its memories.
int64_t ShareOfMemory(const RankResources& resources) {
  const base::Memory& memory = *resources.executor->memory;
  return memory.capacity_bytes() /
         base::CeilDiv(resources.transport->ranks_of_node(), memory.num_alike());
}

absl::Status CheckKvTokens(int64_t tokens, const KvShape& shape, const RankResources& resources) {
  const int64_t most = resources.executor->memory->capacity_bytes() / shape.bytes_per_token();
  if (tokens <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a KV cache of ", tokens, " tokens: the memory holds ", most));
}

KvShape ShapeOf(const ModelConfig& config, kernels::KvFormat format) {
  return {config.num_layers, config.kv_heads, config.head_dim, format};
}

}  // namespace

Engine::Engine(ModelConfig config, const RankResources& resources, const EngineOptions& options)
    : config_(std::move(config)),
      resources_(resources),
      options_(options),
      wire_(ResolveWire(config_, options.wire)) {}

// An empty cache, and a scheduler that knows of no sequence.
void Engine::MakeCache(kernels::KvFormat kv, int64_t kv_tokens) {
  sequences_.clear();
  kv_cache_.reset();
  kv_cache_ = std::make_unique<KvCache>(ShapeOf(config_, kv), kv_tokens, *resources_.executor);
  kv_format_ = kv;
  scheduler_ =
      std::make_unique<Scheduler>(SchedulerLimits{.num_ranks = resources_.transport->size(),
                                                  .max_rows = options_.max_rows,
                                                  .pages_per_rank = kv_cache_->num_pages(),
                                                  .max_positions = config_.max_positions,
                                                  .vocab_size = config_.vocab_size});
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::CreateLocal(const EngineOptions& options,
                                                            const RankResources& resources,
                                                            const LoadProgress& progress) {
  TERNION_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model_directory));
  const ModelConfig& config = checkpoint.config();
  TERNION_ASSIGN_OR_RETURN(Placement placement,
                           MakePlacement(options, config, resources.transport->size()));
  const kernels::KvFormat kv = options.kv.value_or(*kernels::KvFormatOfBits(config.kv_bits));
  const KvShape shape = ShapeOf(config, kv);
  TERNION_RETURN_IF_ERROR(CheckKvTokens(options.kv_tokens, shape, resources));
  const int64_t share = ShareOfMemory(resources), token_bytes = shape.bytes_per_token();
  std::unique_ptr<Engine> engine(new Engine(config, resources, options));
  const ModelOptions model_options = {
      .max_rows = options.max_rows,
      .room_for_weights = RoomForWeights(share, options.kv_tokens * token_bytes),
      .wire = engine->wire_,
      .kv = kv,
      .hierarchical = options.hierarchical};
  TERNION_ASSIGN_OR_RETURN(
      engine->model_,
      Model::Load(checkpoint, std::make_shared<const Placement>(std::move(placement)), resources,
                  model_options, progress));
  const int64_t kv_tokens =
      options.kv_tokens > 0
          ? options.kv_tokens
          : std::clamp<int64_t>(DefaultKvBytes(share, engine->model_->weight_bytes()) / token_bytes,
                                kernels::kPageTokens, kMaxDefaultKvTokens);
  engine->MakeCache(kv, kv_tokens);
  engine->model_->SetMaxPositions(std::min(config.max_positions, engine->kv_tokens()));
  return engine;
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                                       const RankResources& resources,
                                                       const LoadProgress& progress) {
  absl::StatusOr<std::unique_ptr<Engine>> engine;
  try {
    engine = CreateLocal(options, resources, progress);
  } catch (const std::bad_alloc&) {
    engine = absl::ResourceExhaustedError("out of memory while loading the model");
  }
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(*resources.transport, engine.status()));
  // Made from files that each host has of its own.
  const std::string placement = (*engine)->model_->placement().ToJson();
  TERNION_RETURN_IF_ERROR(comm::AgreeOnValue(*resources.transport, "placement of experts",
                                             XXH3_64bits(placement.data(), placement.size())));
  // Peers connect on their first message: better now than under the first request.
  TERNION_RETURN_IF_ERROR((*engine)->model_->Forward(Batch{}));
  resources.transport->traffic().Reset();
  return engine;
}

absl::Status Engine::CheckReconfigure(const WireOptions& wire, kernels::KvFormat kv) const {
  if (kv_cache_ == nullptr) {
    return absl::FailedPreconditionError("there was no memory for the last change of precision");
  }
  if (!idle()) return absl::FailedPreconditionError("sequences are still running");
  TERNION_RETURN_IF_ERROR(
      CheckPrecisions(config_, {.max_rows = options_.max_rows, .wire = wire, .kv = kv}));
  return CheckKvTokens(kv_tokens(), ShapeOf(config_, kv), resources_);
}

absl::Status Engine::Reconfigure(const WireOptions& wire, kernels::KvFormat kv) {
  comm::Transport& transport = *resources_.transport;
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(transport, CheckReconfigure(wire, kv)));
  absl::Status status;
  try {
    wire_ = ResolveWire(config_, wire);
    micro_batches_ = {};
    MakeCache(kv, kv_tokens());
    model_->SetPrecisions(wire_, kv);
  } catch (const std::bad_alloc&) {
    status = absl::ResourceExhaustedError("out of memory for the KV cache or the exchange");
  }
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(transport, status));
  transport.traffic().Reset();
  return absl::OkStatus();
}

void Engine::set_routing_sink(RoutingSink sink) {
  if (!sink) return model_->set_routing_sink(nullptr);
  model_->set_routing_sink([this, sink = std::move(sink)](int layer, int64_t first_row,
                                                          std::span<const int32_t> experts) {
    const int64_t num_rows = static_cast<int64_t>(experts.size()) / config_.top_k;
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = first_row + i;
      sink(row_sequences_[row], batch_.positions[row], layer,
           experts.subspan(i * config_.top_k, config_.top_k));
    }
  });
}

absl::StatusOr<SequenceId> Engine::Submit(Request request) {
  return scheduler_->Submit(std::move(request));
}

absl::StatusOr<StepReport> Engine::Step() {
  StepReport report;
  if (idle()) return report;
  StepPlan plan = scheduler_->Next();
  int64_t rows = 0;
  for (const Chunk& chunk : plan.chunks) {
    report.prompt_tokens += scheduler_->PromptTokensOf(chunk);
    report.generated_tokens += chunk.sample;
    rows += static_cast<int64_t>(chunk.tokens.size());
  }
  if (config_.moe()) {
    plan.micro_batches =
        options_.micro_batches > 0 ? options_.micro_batches : micro_batches_.Choose(rows);
  }
  report.micro_batches = plan.micro_batches;
  const auto start = std::chrono::steady_clock::now();
  const double waited = traffic().wait_seconds();
  TERNION_ASSIGN_OR_RETURN(const std::vector<ChunkResult> results, ExecuteEverywhere(plan));
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  micro_batches_.Record(rows, plan.micro_batches, time.count(), traffic().wait_seconds() - waited);
  TERNION_ASSIGN_OR_RETURN(report.events, scheduler_->Commit(results));
  return report;
}

absl::StatusOr<std::vector<ChunkResult>> Engine::ExecuteEverywhere(const StepPlan& plan) {
  comm::Transport& transport = *resources_.transport;
  if (transport.size() == 1) return Execute(plan);
  TERNION_RETURN_IF_ERROR(comm::Broadcast(transport, plan.Serialize()).status());
  TERNION_ASSIGN_OR_RETURN(const std::vector<ChunkResult> own, Execute(plan));
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> gathered,
                           comm::Gather(transport, SerializeResults(own)));
  std::vector<ChunkResult> results;
  for (const std::string& bytes : gathered) {
    TERNION_ASSIGN_OR_RETURN(const std::vector<ChunkResult> of_rank, ParseResults(bytes));
    results.insert(results.end(), of_rank.begin(), of_rank.end());
  }
  return results;
}

absl::Status Engine::Stop() {
  if (resources_.transport->size() == 1) return absl::OkStatus();
  StepPlan plan;
  plan.stop = true;
  return comm::Broadcast(*resources_.transport, plan.Serialize()).status();
}

absl::Status Engine::Follow() {
  comm::Transport& transport = *resources_.transport;
  while (true) {
    TERNION_ASSIGN_OR_RETURN(const std::string bytes, comm::Broadcast(transport, ""));
    TERNION_ASSIGN_OR_RETURN(const StepPlan plan,
                             StepPlan::Parse(bytes, config_.vocab_size, transport.size()));
    if (plan.stop) return absl::OkStatus();
    TERNION_ASSIGN_OR_RETURN(const std::vector<ChunkResult> results, Execute(plan));
    TERNION_RETURN_IF_ERROR(comm::Gather(transport, SerializeResults(results)).status());
  }
}

// Starts and ends sequences, and turns this rank's chunks into rows.
absl::Status Engine::Prepare(const StepPlan& plan) {
  const RankId self = resources_.transport->rank();
  for (SequenceId id : plan.ended) sequences_.erase(id);
  for (const SequenceStart& start : plan.starts) {
    if (start.owner != self) continue;
    LocalSequence& sequence = sequences_[start.id];
    TERNION_ASSIGN_OR_RETURN(sequence.pages, kv_cache_->Reserve(start.max_tokens));
    sequence.sampling = start.sampling;
  }
  batch_.Clear();
  row_sequences_.clear();
  batch_.step = plan.step;
  batch_.micro_batches = plan.micro_batches;
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.owner != self) continue;
    const auto found = sequences_.find(chunk.sequence);
    const int64_t count = static_cast<int64_t>(chunk.tokens.size());
    if (found == sequences_.end() || batch_.num_rows() + count > options_.max_rows ||
        chunk.position + count >
            std::min(found->second.pages.capacity_tokens(), config_.max_positions)) {
      return absl::InvalidArgumentError(absl::StrCat("step ", plan.step, ": sequence ",
                                                     base::Index(chunk.sequence),
                                                     " does not fit what this rank reserved"));
    }
    batch_.tokens.insert(batch_.tokens.end(), chunk.tokens.begin(), chunk.tokens.end());
    batch_.pages.resize(batch_.tokens.size(), &found->second.pages);
    row_sequences_.resize(batch_.tokens.size(), chunk.sequence);
    for (int64_t i = 0; i < count; ++i) {
      batch_.positions.push_back(chunk.position + static_cast<int32_t>(i));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ChunkResult>> Engine::Execute(const StepPlan& plan) {
  TERNION_RETURN_IF_ERROR(Prepare(plan));
  TERNION_RETURN_IF_ERROR(model_->Forward(batch_));
  std::vector<ChunkResult> results;
  logit_rows_.clear();
  int32_t row = 0;
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.owner != resources_.transport->rank()) continue;
    const int32_t count = static_cast<int32_t>(chunk.tokens.size());
    // To score, every row's logits count; to sample, those of the last.
    const int32_t first = !chunk.targets.empty() ? 0 : chunk.sample ? count - 1 : count;
    for (int32_t i = first; i < count; ++i) {
      logit_rows_.push_back({&chunk, i, row + i, static_cast<int32_t>(results.size())});
    }
    results.push_back(
        {.sequence = chunk.sequence, .logits_hash = sequences_.at(chunk.sequence).logits_hash});
    row += count;
  }
  TERNION_RETURN_IF_ERROR(RunHead(results));
  return results;
}

// Logits of logit_rows_, many rows at a time so that the head is read once for all of them, and
// what is wanted of them.
absl::Status Engine::RunHead(std::vector<ChunkResult>& results) {
  const std::span<const LogitRow> all(logit_rows_);
  for (size_t begin = 0; begin < all.size(); begin += Model::kMaxLogitRows) {
    const auto group =
        all.subspan(begin, std::min<size_t>(Model::kMaxLogitRows, all.size() - begin));
    std::array<int32_t, Model::kMaxLogitRows> rows;
    for (size_t i = 0; i < group.size(); ++i) rows[i] = group[i].batch_row;
    model_->Head({rows.data(), group.size()});
    TERNION_RETURN_IF_ERROR(SampleRows(group, results));
    const auto is_read = [&](const LogitRow& row) {
      return options_.hash_logits || !row.chunk->sample;
    };
    if (std::none_of(group.begin(), group.end(), is_read)) continue;
    TERNION_ASSIGN_OR_RETURN(const std::span<const float> logits, model_->Logits());
    for (size_t i = 0; i < group.size(); ++i) {
      TakeLogits(group[i], logits.subspan(i * config_.vocab_size, config_.vocab_size),
                 results[group[i].result]);
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::SampleRows(std::span<const LogitRow> group,
                                std::vector<ChunkResult>& results) {
  std::array<kernels::SampleParams, Model::kMaxLogitRows> params;  // greedy for rows to be scored
  bool samples = false;
  for (size_t i = 0; i < group.size(); ++i) {
    const Chunk& chunk = *group[i].chunk;
    if (!chunk.sample) continue;
    samples = true;
    params[i] = ParamsAt(sequences_.at(chunk.sequence).sampling, chunk.position + group[i].index);
  }
  if (!samples) return absl::OkStatus();
  TERNION_ASSIGN_OR_RETURN(const std::span<const int32_t> tokens,
                           model_->Sample({params.data(), group.size()}));
  for (size_t i = 0; i < group.size(); ++i) {
    if (group[i].chunk->sample) results[group[i].result].token = tokens[i];
  }
  return absl::OkStatus();
}

void Engine::TakeLogits(const LogitRow& row, std::span<const float> logits, ChunkResult& result) {
  const Chunk& chunk = *row.chunk;
  if (options_.hash_logits) {
    LocalSequence& sequence = sequences_.at(chunk.sequence);
    sequence.logits_hash =
        XXH3_64bits_withSeed(logits.data(), logits.size_bytes(), sequence.logits_hash);
    result.logits_hash = sequence.logits_hash;
  }
  if (chunk.sample) return;
  if (chunk.targets[row.index] != kNoTarget) {
    result.nll += NegativeLogLikelihood(logits, chunk.targets[row.index]);
  }
  if (logits_sink_) logits_sink_(chunk.sequence, chunk.position + row.index, logits);
}

}  // namespace ternion::runtime
