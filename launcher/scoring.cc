#include "launcher/scoring.h"

#include <algorithm>
#include <utility>

#include "base/file.h"
#include "base/status.h"
#include "runtime/tokenizer.h"

namespace ternion::launcher {
namespace {

// Longest window that a text is scored in, in tokens, whatever the model's positions.
constexpr int64_t kMaxWindow = 2048;

}  // namespace

absl::StatusOr<ScoredText> CutText(const std::string& text_file, const std::string& model_directory,
                                   const runtime::ModelConfig& config, int64_t max_window) {
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(text_file));
  TERNION_ASSIGN_OR_RETURN(const runtime::Tokenizer tokenizer,
                           runtime::Tokenizer::Load(model_directory));
  TokenIds tokens;
  if (config.bos_id >= 0) tokens.push_back(config.bos_id);
  const TokenIds ids = tokenizer.Encode(text);
  tokens.insert(tokens.end(), ids.begin(), ids.end());
  if (tokens.size() < 2) return absl::InvalidArgumentError(text_file + " has nothing to predict");
  if (max_window < 2) return absl::InvalidArgumentError("a window of one token predicts nothing");
  ScoredText cut;
  cut.num_bytes = static_cast<int64_t>(text.size());
  cut.num_predicted = static_cast<int64_t>(tokens.size()) - 1;
  for (int64_t begin = 0; begin < cut.num_predicted; begin += max_window - 1) {
    const int64_t end = std::min<int64_t>(begin + max_window, tokens.size());
    cut.windows.emplace_back(tokens.begin() + begin, tokens.begin() + end);
  }
  return cut;
}

int64_t MaxWindow(const runtime::Engine& engine) {
  return std::min({engine.config().max_positions, engine.kv_tokens(), kMaxWindow});
}

absl::Status SubmitWindows(std::span<const TokenIds> windows, runtime::Engine& engine) {
  for (const TokenIds& window : windows) {
    runtime::Request request;
    request.prompt = window;
    request.score = true;
    TERNION_RETURN_IF_ERROR(engine.Submit(std::move(request)).status());
  }
  return absl::OkStatus();
}

absl::StatusOr<double> RunToIdle(runtime::Engine& engine,
                                 const std::function<void(int64_t)>& on_tokens) {
  double nll = 0;
  while (!engine.idle()) {
    TERNION_ASSIGN_OR_RETURN(const runtime::StepReport step, engine.Step());
    for (const runtime::SequenceEvent& event : step.events) nll += event.nll;
    on_tokens(step.prompt_tokens);
  }
  return nll;
}

}  // namespace ternion::launcher
