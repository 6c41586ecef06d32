#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "launcher/commands.h"
#include "launcher/npy.h"
#include "launcher/progress.h"
#include "launcher/report.h"
#include "runtime/tokenizer.h"

namespace ternion::launcher {
namespace {

// Longest window that a text is scored in, in tokens.
constexpr int64_t kMaxWindow = 2048;

absl::StatusOr<std::vector<int32_t>> ReadIds(const std::string& path) {
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(path));
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto is_id = [](const Json& value) {
    return value.is_number_integer() && value.get<int64_t>() >= 0 &&
           value.get<int64_t>() <= INT32_MAX;
  };
  if (!json.is_array() || json.empty() || !std::all_of(json.begin(), json.end(), is_id)) {
    return absl::InvalidArgumentError(path + " is not a JSON array of token ids");
  }
  return json.get<std::vector<int32_t>>();
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
  absl::Status Finish();

 private:
  absl::Status PrepareIds();
  absl::Status PrepareText();

  const EvalOptions& options_;
  runtime::Engine& engine_;
  std::optional<base::AtomicFile> logits_file_;
  absl::Status write_status_;
  int64_t total_rows_ = 0;  // positions to run
  int64_t scored_ = 0;      // tokens predicted
  int64_t bytes_ = 0;
  double nll_ = 0;  // nats
};

// One sequence; it is the first, so rank 0 owns it and sees its logits.
absl::Status Evaluation::PrepareIds() {
  runtime::Request request;
  TERNION_ASSIGN_OR_RETURN(request.prompt, ReadIds(options_.ids_file));
  request.score = true;
  total_rows_ = static_cast<int64_t>(request.prompt.size());
  TERNION_RETURN_IF_ERROR(engine_.Submit(std::move(request)).status());
  TERNION_ASSIGN_OR_RETURN(base::AtomicFile file, base::AtomicFile::Create(options_.logits_out));
  logits_file_.emplace(std::move(file));
  TERNION_RETURN_IF_ERROR(logits_file_->Write(NpyHeader(total_rows_, engine_.config().vocab_size)));
  engine_.set_logits_sink([this](runtime::SequenceId, int32_t, std::span<const float> logits) {
    const std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(logits.data()),
                                         logits.size_bytes());
    write_status_.Update(logits_file_->Write(bytes));
  });
  return absl::OkStatus();
}

// Windows that overlap by one token, so that every token but the first is predicted once; with a
// bos, the first too.
absl::Status Evaluation::PrepareText() {
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(options_.text));
  TERNION_ASSIGN_OR_RETURN(const runtime::Tokenizer tokenizer,
                           runtime::Tokenizer::Load(options_.engine.model));
  const runtime::ModelConfig& config = engine_.config();
  std::vector<int32_t> tokens;
  if (config.bos_id >= 0) tokens.push_back(config.bos_id);
  const std::vector<int32_t> ids = tokenizer.Encode(text);
  tokens.insert(tokens.end(), ids.begin(), ids.end());
  if (tokens.size() < 2)
    return absl::InvalidArgumentError(options_.text + " has nothing to predict");
  bytes_ = static_cast<int64_t>(text.size());
  scored_ = static_cast<int64_t>(tokens.size()) - 1;
  const int64_t window = std::min({config.max_positions, engine_.kv_tokens(), kMaxWindow});
  if (window < 2) return absl::InvalidArgumentError("a window of one token predicts nothing");
  for (int64_t begin = 0; begin < scored_; begin += window - 1) {
    const int64_t end = std::min<int64_t>(begin + window, tokens.size());
    runtime::Request request;
    request.prompt.assign(tokens.begin() + begin, tokens.begin() + end);
    request.score = true;
    total_rows_ += end - begin;
    TERNION_RETURN_IF_ERROR(engine_.Submit(std::move(request)).status());
  }
  return absl::OkStatus();
}

absl::Status Evaluation::RunToEnd() {
  ProgressBar bar("evaluating", true);
  int64_t done = 0;
  while (!engine_.idle()) {
    TERNION_ASSIGN_OR_RETURN(const runtime::StepReport step, engine_.Step());
    for (const runtime::SequenceEvent& event : step.events) nll_ += event.nll;
    done += step.prompt_tokens;
    bar.Update(done, total_rows_);
  }
  return absl::OkStatus();
}

absl::Status Evaluation::Finish() {
  TERNION_RETURN_IF_ERROR(write_status_);
  if (logits_file_) return logits_file_->Commit();
  const double bits_per_byte = nll_ / std::log(2.0) / static_cast<double>(bytes_);
  const double perplexity = std::exp(nll_ / static_cast<double>(scored_));
  std::printf("%s: %lld tokens, %lld bytes, %.4f bits per byte, perplexity %.3f\n",
              options_.text.c_str(), static_cast<long long>(scored_),
              static_cast<long long>(bytes_), bits_per_byte, perplexity);
  if (options_.json.empty()) return absl::OkStatus();
  return WriteJson(options_.json, {{"tokens", scored_},
                                   {"bytes", bytes_},
                                   {"nll", nll_},
                                   {"bits_per_byte", bits_per_byte},
                                   {"perplexity", perplexity},
                                   {"ranks", engine_.num_ranks()},
                                   {"wire", WireJson(engine_.wire())}});
}

}  // namespace

absl::Status Eval(const EvalOptions& options, World& world) {
  const absl::Status usable = world.is_root() ? CheckOptions(options) : absl::OkStatus();
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world.transport(), usable));
  TERNION_ASSIGN_OR_RETURN(LoadedEngine loaded, LoadEngine(options.engine, world));
  Evaluation evaluation(options, *loaded.engine);
  const absl::Status ready = world.is_root() ? evaluation.Prepare() : absl::OkStatus();
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world.transport(), ready));
  if (!world.is_root()) {
    TERNION_RETURN_IF_ERROR(loaded.engine->Follow());
  } else {
    TERNION_RETURN_IF_ERROR(evaluation.RunToEnd());
    TERNION_RETURN_IF_ERROR(loaded.engine->Stop());
  }
  const absl::Status finished = world.is_root() ? evaluation.Finish() : absl::OkStatus();
  return comm::BroadcastStatus(world.transport(), finished);
}

}  // namespace ternion::launcher
