#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "launcher/commands.h"
#include "launcher/ladder.h"
#include "launcher/npy.h"
#include "launcher/progress.h"
#include "launcher/report.h"
#include "launcher/scoring.h"
#include "launcher/trace_recorder.h"

namespace ternion::launcher {
namespace {

absl::StatusOr<TokenIds> ReadIds(const std::string& path) {
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(path));
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto is_id = [](const Json& value) {
    return value.is_number_integer() && value.get<int64_t>() >= 0 &&
           value.get<int64_t>() <= INT32_MAX;
  };
  if (!json.is_array() || json.empty() || !std::all_of(json.begin(), json.end(), is_id)) {
    return absl::InvalidArgumentError(path + " is not a JSON array of token ids");
  }
  return json.get<TokenIds>();
}

// Rank 0, before the model is loaded.
absl::Status CheckOptions(const EvalOptions& options) {
  const bool ids = !options.ids_file.empty(), text = !options.text.empty();
  if (ids == text) return absl::InvalidArgumentError("eval needs either --ids-file or --text");
  if (ids && options.logits_out.empty()) {
    return absl::InvalidArgumentError("--ids-file needs --logits-out");
  }
  if (text && !options.logits_out.empty()) {
    return absl::InvalidArgumentError("--logits-out goes with --ids-file");
  }
  if (ids && options.ladder) return absl::InvalidArgumentError("--ladder goes with --text");
  const EngineFlags defaults, &flags = options.engine;
  if (options.ladder && (flags.wire_dispatch != defaults.wire_dispatch ||
                         flags.wire_combine != defaults.wire_combine ||
                         flags.wire != defaults.wire || flags.kv != defaults.kv)) {
    return absl::InvalidArgumentError(
        "--ladder walks the precisions itself: leave --wire* and --kv out");
  }
  if (!options.record_trace.empty()) {
    if (ids || options.ladder) {
      return absl::InvalidArgumentError("--record-trace goes with --text, without --ladder");
    }
    if (flags.wire_dispatch != defaults.wire_dispatch ||
        flags.wire_combine != defaults.wire_combine) {
      return absl::InvalidArgumentError(
          "--record-trace runs with --wire exact: leave --wire-dispatch and --wire-combine out");
    }
  }
  TERNION_RETURN_IF_ERROR(CheckWritable(options.record_trace));
  TERNION_RETURN_IF_ERROR(CheckWritable(options.logits_out));
  return CheckWritable(options.json);
}

// Rank 0's side of `eval`.
class Evaluation {
 public:
  Evaluation(const EvalOptions& options, runtime::Engine& engine)
      : options_(options), engine_(engine) {}

  // Submits the work; everything that can be wrong with the input comes out here.
  absl::Status Prepare() { return options_.text.empty() ? PrepareIds() : PrepareText(); }
  absl::Status RunToEnd();
  absl::Status SaveTrace(const experts::RoutingTrace& trace);
  absl::Status Finish();

 private:
  absl::Status PrepareIds();
  absl::Status PrepareText();

  const EvalOptions& options_;
  runtime::Engine& engine_;
  std::optional<base::AtomicFile> logits_file_;
  absl::Status write_status_;
  ScoredText text_;
  double nll_ = 0;  // nats
  std::string trace_hash_;
};

// One sequence; it is the first, so rank 0 owns it and sees its logits.
absl::Status Evaluation::PrepareIds() {
  TERNION_ASSIGN_OR_RETURN(TokenIds ids, ReadIds(options_.ids_file));
  text_.windows.push_back(std::move(ids));
  TERNION_RETURN_IF_ERROR(SubmitWindows(text_.windows, engine_));
  TERNION_ASSIGN_OR_RETURN(base::AtomicFile file, base::AtomicFile::Create(options_.logits_out));
  logits_file_.emplace(std::move(file));
  TERNION_RETURN_IF_ERROR(
      logits_file_->Write(NpyHeader(text_.windows[0].size(), engine_.config().vocab_size)));
  engine_.set_logits_sink([this](runtime::SequenceId, int32_t, std::span<const float> logits) {
    const std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(logits.data()),
                                         logits.size_bytes());
    write_status_.Update(logits_file_->Write(bytes));
  });
  return absl::OkStatus();
}

absl::Status Evaluation::PrepareText() {
  if (!options_.record_trace.empty() && !engine_.config().moe()) {
    return absl::InvalidArgumentError("--record-trace needs a model with experts");
  }
  TERNION_ASSIGN_OR_RETURN(
      text_, CutText(options_.text, options_.engine.model, engine_.config(), MaxWindow(engine_)));
  return SubmitWindows(text_.windows, engine_);
}

absl::Status Evaluation::RunToEnd() {
  ProgressBar bar("evaluating", true);
  int64_t total = 0, done = 0;
  for (const TokenIds& window : text_.windows) total += static_cast<int64_t>(window.size());
  const auto on_tokens = [&](int64_t count) { bar.Update(done += count, total); };
  TERNION_ASSIGN_OR_RETURN(nll_, RunToIdle(engine_, on_tokens));
  return absl::OkStatus();
}

absl::Status Evaluation::SaveTrace(const experts::RoutingTrace& trace) {
  TERNION_RETURN_IF_ERROR(experts::SaveTrace(trace, options_.record_trace));
  trace_hash_ = absl::StrFormat("%016x", trace.Hash());
  std::printf("%s: routing of %lld tokens in %d layers, %s\n", options_.record_trace.c_str(),
              static_cast<long long>(trace.shape.num_tokens), trace.shape.num_layers,
              trace_hash_.c_str());
  return absl::OkStatus();
}

absl::Status Evaluation::Finish() {
  TERNION_RETURN_IF_ERROR(write_status_);
  if (logits_file_) return logits_file_->Commit();
  const double bits_per_byte = nll_ / std::log(2.0) / static_cast<double>(text_.num_bytes);
  const double perplexity = std::exp(nll_ / static_cast<double>(text_.num_predicted));
  std::printf("%s: %lld tokens, %lld bytes, %.4f bits per byte, perplexity %.3f\n",
              options_.text.c_str(), static_cast<long long>(text_.num_predicted),
              static_cast<long long>(text_.num_bytes), bits_per_byte, perplexity);
  if (options_.json.empty()) return absl::OkStatus();
  Json json = {{"tokens", text_.num_predicted},
               {"bytes", text_.num_bytes},
               {"nll", nll_},
               {"bits_per_byte", bits_per_byte},
               {"perplexity", perplexity},
               {"ranks", engine_.num_ranks()},
               {"wire", WireJson(engine_.wire())},
               {"kv", kernels::KvFormatName(engine_.kv_format())}};
  if (!trace_hash_.empty()) json["trace_hash"] = trace_hash_;
  return WriteJson(options_.json, json);
}

}  // namespace

absl::Status Eval(const EvalOptions& options, World& world) {
  const absl::Status usable = world.is_root() ? CheckOptions(options) : absl::OkStatus();
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world.transport(), usable));
  if (options.ladder) return EvalLadder(options, world);
  EngineFlags flags = options.engine;
  if (!options.record_trace.empty()) flags.wire = "exact";  // so that ranks do not matter
  TERNION_ASSIGN_OR_RETURN(LoadedEngine loaded, LoadEngine(flags, world));
  Evaluation evaluation(options, *loaded.engine);
  std::optional<TraceRecorder> recorder;
  if (!options.record_trace.empty()) recorder.emplace(*loaded.engine);
  const absl::Status ready = world.is_root() ? evaluation.Prepare() : absl::OkStatus();
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world.transport(), ready));
  if (!world.is_root()) {
    TERNION_RETURN_IF_ERROR(loaded.engine->Follow());
  } else {
    TERNION_RETURN_IF_ERROR(evaluation.RunToEnd());
    TERNION_RETURN_IF_ERROR(loaded.engine->Stop());
  }
  absl::Status finished;
  if (recorder) {
    TERNION_ASSIGN_OR_RETURN(const experts::RoutingTrace trace,
                             recorder->Gather(world.transport()));
    if (world.is_root()) finished = evaluation.SaveTrace(trace);
  }
  if (world.is_root()) finished.Update(evaluation.Finish());
  return comm::BroadcastStatus(world.transport(), finished);
}

}  // namespace ternion::launcher
