#include "launcher/bench_decode.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/checked.h"
#include "base/random.h"
#include "base/status.h"
#include "comm/collective.h"
#include "launcher/memory_speed.h"
#include "launcher/memory_table.h"
#include "launcher/progress.h"
#include "launcher/report.h"
#include "launcher/statistics.h"
#include "launcher/step_times.h"
#include "launcher/weight_reads.h"

namespace ternion::launcher {
namespace {

using runtime::Engine;

// Steps in which all sequences generate, before those that are timed (a device records the second
// of a kind) and after them.
constexpr int64_t kWarmUpSteps = 4;
constexpr int64_t kCountedSteps = 4;

// Steps until all of `sequences` prompts on a rank are done, when each step has `max_rows` rows and
// generating sequences come first (runtime::Scheduler).
int64_t PromptSteps(int64_t sequences, int64_t prompt_tokens, int64_t max_rows) {
  int64_t steps = 0;
  for (int64_t done = 0; done < sequences * prompt_tokens; ++steps) {
    done += max_rows - done / prompt_tokens;
  }
  return steps;
}

// The timed steps of a batch, on rank 0.
struct TimedSteps {
  std::vector<double> step_ms;
  StepTimes times;
  int64_t context_tokens = 0;  // attended to, over all sequences and steps

  int64_t size() const { return static_cast<int64_t>(step_ms.size()); }
};

// What a step takes of one rank, and how fast the rank has it.
struct RankReads {
  int node = 0;
  double rows = 0;
  double weight_bytes = 0;
  double ternary_matrices = 0;
  double kv_bytes = 0;
  double bytes_per_second = 0;

  double bytes() const { return weight_bytes + kv_bytes; }
};

struct BatchResult {
  int64_t batch = 0;
  TimedSteps steps;
  std::vector<RankReads> ranks;
  double bound_seconds = 0;                // of a step
  std::optional<double> experts_of_layer;  // that have rows, on all ranks; none in a dense model

  double p50_ms() const { return Percentile(steps.step_ms, 0.5); }
  double tokens_per_second() const { return static_cast<double>(batch) / p50_ms() * 1e3; }
  double bound_tokens_per_second() const { return static_cast<double>(batch) / bound_seconds; }
  double percent_of_bound() const { return 100 * bound_seconds / p50_ms() * 1e3; }
  double Sum(double RankReads::*field) const {
    double sum = 0;
    for (const RankReads& of : ranks) sum += of.*field;
    return sum;
  }
};

class DecodeBench {
 public:
  DecodeBench(const BenchDecodeOptions& options, World& world, LoadedEngine& loaded,
              WeightReads& reads, MemorySpeed& speed)
      : options_(options),
        world_(world),
        loaded_(loaded),
        engine_(*loaded.engine),
        config_(engine_.config()),
        reads_(reads),
        speed_(speed) {}

  // Collective, as is Run.
  absl::Status Check() const;
  absl::Status Run();

 private:
  int64_t MostOnARank(int64_t batch) const {
    return base::CeilDiv(batch, int64_t{world_.transport().size()});
  }
  int64_t TokensToGenerate(int64_t batch) const;
  absl::Status CheckBatch(int64_t batch) const;

  absl::Status Together(absl::FunctionRef<absl::Status()> of_rank_0);
  absl::Status Submit(int64_t batch);
  absl::Status TimeSteps(int64_t batch, TimedSteps& steps);
  absl::StatusOr<BatchResult> RunBatch(int64_t batch);
  absl::Status GatherReads(const WeightReadCounts& counts, double bytes_per_second,
                           BatchResult& result);
  double BoundSeconds(const std::vector<RankReads>& ranks) const;
  std::optional<double> ExpertsOfLayer(const std::vector<RankReads>& ranks) const;

  void PrintHeader(const Json& memory) const;
  void PrintBatch(const BatchResult& result) const;
  Json BatchJson(const BatchResult& result) const;
  Json ToJson(const Json& memory, const Json& batches, const WorldReport& report) const;

  const BenchDecodeOptions& options_;
  World& world_;
  LoadedEngine& loaded_;
  Engine& engine_;
  const runtime::ModelConfig& config_;
  WeightReads& reads_;
  MemorySpeed& speed_;
};

// ---- Checking

// All sequences generate in the steps that count: one that starts first goes on until the last one
// has, too.
int64_t DecodeBench::TokensToGenerate(int64_t batch) const {
  return PromptSteps(MostOnARank(batch), options_.prompt_tokens, engine_.max_rows()) +
         kWarmUpSteps + options_.tokens + kCountedSteps;
}

absl::Status DecodeBench::CheckBatch(int64_t batch) const {
  const int64_t on_a_rank = MostOnARank(batch);
  if (on_a_rank > engine_.max_rows()) {
    return absl::InvalidArgumentError(absl::StrCat("--batch ", batch, ": ", on_a_rank,
                                                   " sequences on a rank; a step has ",
                                                   engine_.max_rows(), " rows"));
  }
  const int64_t tokens = options_.prompt_tokens + TokensToGenerate(batch);
  const std::string needs =
      absl::StrCat("--batch ", batch, ": a sequence has ", tokens, " tokens (--prompt-tokens ",
                   options_.prompt_tokens, ", --tokens ", options_.tokens, " and ",
                   tokens - options_.prompt_tokens - options_.tokens, " around those timed)");
  if (tokens > config_.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat(needs, "; the model has ", config_.max_positions, " positions"));
  }
  const int64_t kv_tokens =
      on_a_rank * runtime::KvCache::PagesFor(tokens) * int64_t{kernels::kPageTokens};
  if (kv_tokens > engine_.kv_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat(needs, ", and a rank's ", on_a_rank, " take ",
                                                   kv_tokens, " tokens of KV cache; it has ",
                                                   engine_.kv_tokens(), " (--kv-tokens)"));
  }
  return absl::OkStatus();
}

absl::Status DecodeBench::Check() const {
  absl::Status status;
  for (int64_t batch : options_.batches) status.Update(CheckBatch(batch));
  return comm::AgreeOnStatus(world_.transport(), status);
}

// ---- Measuring

// What rank 0 steps through, the others follow.
absl::Status DecodeBench::Together(absl::FunctionRef<absl::Status()> of_rank_0) {
  if (!world_.is_root()) return engine_.Follow();
  TERNION_RETURN_IF_ERROR(of_rank_0());
  return engine_.Stop();
}

// Every sequence has another prompt: of equal ones all rows would take the same experts.
absl::Status DecodeBench::Submit(int64_t batch) {
  for (int64_t i = 0; i < batch; ++i) {
    runtime::Request request;
    for (int64_t j = 0; j < options_.prompt_tokens; ++j) {
      const uint64_t bits = base::RandomBits(options_.seed, i * options_.prompt_tokens + j);
      request.prompt.push_back(static_cast<int32_t>(bits % config_.vocab_size));
    }
    request.max_new_tokens = static_cast<int32_t>(TokensToGenerate(batch));
    TERNION_RETURN_IF_ERROR(engine_.Submit(std::move(request)).status());
  }
  return absl::OkStatus();
}

absl::Status DecodeBench::TimeSteps(int64_t batch, TimedSteps& steps) {
  ProgressBar bar(absl::StrCat("batch ", batch), world_.is_root());
  int64_t full_steps = 0;
  int64_t tokens = batch * options_.prompt_tokens;  // of all sequences; the last is not cached yet
  while (steps.size() < options_.tokens) {
    if (engine_.idle()) return absl::InternalError("sequences ended before all steps were timed");
    TERNION_ASSIGN_OR_RETURN(const TimedStep step, StepTimed(engine_));
    const int64_t generated = step.report.generated_tokens;
    const bool full = step.report.prompt_tokens == 0 && generated == batch;
    if (full && ++full_steps > kWarmUpSteps) {
      steps.step_ms.push_back(step.times.total * 1e3);
      steps.times += step.times;
      steps.context_tokens += tokens;
      bar.Update(steps.size(), options_.tokens);
    }
    tokens += generated;
  }
  return absl::OkStatus();
}

absl::StatusOr<BatchResult> DecodeBench::RunBatch(int64_t batch) {
  BatchResult result;
  result.batch = batch;
  TERNION_ASSIGN_OR_RETURN(const double speed_before, speed_.Measure());
  const absl::Status submitted = world_.is_root() ? Submit(batch) : absl::OkStatus();
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world_.transport(), submitted));
  TERNION_RETURN_IF_ERROR(Together([&] { return TimeSteps(batch, result.steps); }));
  const auto step_while = [&](absl::FunctionRef<bool()> more) -> absl::Status {
    while (more()) TERNION_RETURN_IF_ERROR(engine_.Step().status());
    return absl::OkStatus();
  };
  reads_.Start();
  int64_t counted = 0;
  TERNION_RETURN_IF_ERROR(
      Together([&] { return step_while([&] { return counted++ < kCountedSteps; }); }));
  const WeightReadCounts counts = reads_.Stop();
  TERNION_RETURN_IF_ERROR(Together([&] { return step_while([&] { return !engine_.idle(); }); }));
  TERNION_ASSIGN_OR_RETURN(const double speed_after, speed_.Measure());
  TERNION_RETURN_IF_ERROR(GatherReads(counts, std::max(speed_before, speed_after), result));
  return result;
}

// The result is filled on rank 0.
absl::Status DecodeBench::GatherReads(const WeightReadCounts& counts, double bytes_per_second,
                                      BatchResult& result) {
  const comm::Transport& transport = world_.transport();
  TERNION_CHECK(counts.steps == kCountedSteps);
  const double per_step = 1.0 / static_cast<double>(counts.steps);
  const Json own = {{"node", transport.NodeOf(transport.rank())},
                    {"rows", static_cast<double>(counts.rows) * per_step},
                    {"weight_bytes", static_cast<double>(counts.bytes) * per_step},
                    {"matrices", static_cast<double>(counts.ternary_matrices) * per_step},
                    {"speed", bytes_per_second}};
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                           comm::Gather(world_.transport(), own.dump()));
  if (!world_.is_root()) return absl::OkStatus();
  const double context_of_row = static_cast<double>(result.steps.context_tokens) /
                                static_cast<double>(result.steps.size() * result.batch);
  const double token_bytes =
      static_cast<double>(engine_.kv_bytes()) / static_cast<double>(engine_.kv_tokens());
  for (const std::string& text : texts) {
    const Json of = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!of.is_object()) return absl::InvalidArgumentError("a rank sent a malformed report");
    result.ranks.push_back({.node = of["node"],
                            .rows = of["rows"],
                            .weight_bytes = of["weight_bytes"],
                            .ternary_matrices = of["matrices"],
                            .kv_bytes = of["rows"].get<double>() * context_of_row * token_bytes,
                            .bytes_per_second = of["speed"]});
  }
  result.bound_seconds = BoundSeconds(result.ranks);
  result.experts_of_layer = ExpertsOfLayer(result.ranks);
  return absl::OkStatus();
}

// The slowest memory's time for what its ranks read. CPUs of a node have one memory, and what one
// rank leaves of its speed another can use; of a device each rank has what it measured.
double DecodeBench::BoundSeconds(const std::vector<RankReads>& ranks) const {
  struct Memory {
    double bytes = 0;
    double bytes_per_second = 0;
  };
  std::map<int, Memory> memories;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const bool on_cpu = options_.engine.world.device == "cpu";
    Memory& memory = memories[on_cpu ? ranks[rank].node : static_cast<int>(rank)];
    memory.bytes += ranks[rank].bytes();
    memory.bytes_per_second += ranks[rank].bytes_per_second;
  }
  double slowest = 0;
  for (const auto& [id, memory] : memories) {
    slowest = std::max(slowest, memory.bytes / memory.bytes_per_second);
  }
  return slowest;
}

// What is not attention's, nor a dense MLP's or shared expert's, belongs to experts: three matrices
// each.
std::optional<double> DecodeBench::ExpertsOfLayer(const std::vector<RankReads>& ranks) const {
  if (!config_.moe()) return std::nullopt;
  int64_t others = 0;
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    others += config_.local_intermediate(layer) > 0 ? 7 : 4;
  }
  double matrices = 0;
  for (const RankReads& of : ranks) {
    matrices += of.ternary_matrices - (of.rows > 0 ? static_cast<double>(others) : 0);
  }
  return matrices / 3 / config_.num_expert_layers();
}

absl::Status DecodeBench::Run() {
  TERNION_ASSIGN_OR_RETURN(const Json memory, CollectMemory(engine_, world_));
  if (world_.is_root()) PrintHeader(memory);
  Json batches = Json::array();
  for (int64_t batch : options_.batches) {
    TERNION_ASSIGN_OR_RETURN(const BatchResult result, RunBatch(batch));
    if (!world_.is_root()) continue;
    PrintBatch(result);
    batches.push_back(BatchJson(result));
  }
  TERNION_ASSIGN_OR_RETURN(const WorldReport report, CollectReport(loaded_, world_));
  absl::Status written;
  if (world_.is_root() && !options_.json.empty()) {
    written = WriteJson(options_.json, ToJson(memory, batches, report));
  }
  return comm::BroadcastStatus(world_.transport(), written);
}

// ---- Telling

void DecodeBench::PrintHeader(const Json& memory) const {
  const int ranks = world_.transport().size();
  absl::PrintF("# ternion bench decode: %s (%s), %d rank%s, %s, %d thread%s per rank\n",
               options_.engine.model, config_.model_type, ranks, ranks == 1 ? "" : "s",
               world_.isa(), world_.num_threads(), world_.num_threads() == 1 ? "" : "s");
  absl::PrintF("# prompts of %d random tokens, then %d steps timed; KV %s; loaded in %.2f s\n\n",
               options_.prompt_tokens, options_.tokens, kernels::KvFormatName(engine_.kv_format()),
               loaded_.load_seconds);
  PrintMemory(memory);
  absl::PrintF(
      "\n# the bound: a step reads the weights it needs (of experts, those with rows) and the KV "
      "cache once, at the speed of %s\n",
      options_.engine.world.device == "cpu" ? "reads" : "copies");
  absl::PrintF("%-7s %9s %9s %9s %10s %10s %9s %8s %10s %9s\n", "# batch", "tok/s", "ms/step",
               "p90", "weights MB", "KV MB", "experts", "GB/s", "bound", "of bound");
  std::fflush(stdout);
}

void DecodeBench::PrintBatch(const BatchResult& result) const {
  absl::PrintF("%7d %9.1f %9.3f %9.3f %10.1f %10.1f %9s %8.1f %10.1f %8.1f%%\n", result.batch,
               result.tokens_per_second(), result.p50_ms(), Percentile(result.steps.step_ms, 0.9),
               result.Sum(&RankReads::weight_bytes) * 1e-6, result.Sum(&RankReads::kv_bytes) * 1e-6,
               result.experts_of_layer ? absl::StrFormat("%.1f", *result.experts_of_layer) : "-",
               result.Sum(&RankReads::bytes_per_second) * 1e-9, result.bound_tokens_per_second(),
               result.percent_of_bound());
  std::fflush(stdout);
}

Json DecodeBench::BatchJson(const BatchResult& result) const {
  Json ranks = Json::array();
  for (const RankReads& of : result.ranks) {
    ranks.push_back({{"rows", of.rows},
                     {"weight_bytes", of.weight_bytes},
                     {"kv_bytes", of.kv_bytes},
                     {"gb_per_s", of.bytes_per_second * 1e-9}});
  }
  const std::vector<double>& ms = result.steps.step_ms;
  return {{"batch", result.batch},
          {"tok_s", result.tokens_per_second()},
          {"step_ms",
           {{"p50", result.p50_ms()}, {"p90", Percentile(ms, 0.9)}, {"max", Percentile(ms, 1.0)}}},
          {"time", result.steps.times.ToJson()},
          {"weight_bytes", result.Sum(&RankReads::weight_bytes)},
          {"kv_bytes", result.Sum(&RankReads::kv_bytes)},
          {"experts_of_layer", result.experts_of_layer ? Json(*result.experts_of_layer) : Json()},
          {"bound_tok_s", result.bound_tokens_per_second()},
          {"percent_of_bound", result.percent_of_bound()},
          {"per_rank", ranks}};
}

Json DecodeBench::ToJson(const Json& memory, const Json& batches, const WorldReport& report) const {
  return {{"model", options_.engine.model},
          {"model_type", config_.model_type},
          {"ranks", world_.transport().size()},
          {"device", options_.engine.world.device},
          {"commit", BuildCommit()},
          {"prompt_tokens", options_.prompt_tokens},
          {"tokens", options_.tokens},
          {"seed", options_.seed},
          {"wire", WireJson(engine_.wire())},
          {"kv", kernels::KvFormatName(engine_.kv_format())},
          {"load_seconds", loaded_.load_seconds},
          {"memory", memory},
          {"batches", batches},
          {"per_rank", report.per_rank}};
}

}  // namespace

absl::Status BenchDecode(const BenchDecodeOptions& options, World& world) {
  absl::Status usable;
  if (options.batches.empty()) usable = absl::InvalidArgumentError("--batch is empty");
  if (world.is_root()) usable.Update(CheckWritable(options.json));
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(world.transport(), usable));
  WeightReads reads(world.kernels(), *world.resources().executor);
  MemorySpeed speed(world);
  TERNION_ASSIGN_OR_RETURN(
      LoadedEngine loaded,
      LoadEngine(options.engine, world, /*hash_logits=*/false, &reads.kernels()));
  DecodeBench bench(options, world, loaded, reads, speed);
  TERNION_RETURN_IF_ERROR(bench.Check());
  return bench.Run();
}

}  // namespace ternion::launcher
