// Scoring texts: how a text is cut, and rank 0's loop over an engine's steps.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/engine.h"

namespace ternion::launcher {

using TokenIds = std::vector<int32_t>;

// Windows that overlap by one token, so that every token but the first is predicted once; with a
// bos, the first too.
struct ScoredText {
  std::vector<TokenIds> windows;
  int64_t num_predicted = 0;  // tokens
  int64_t num_bytes = 0;
};

// The text of a UTF-8 file in windows of at most `max_window` tokens. InvalidArgument when there is
// nothing to predict.
absl::StatusOr<ScoredText> CutText(const std::string& text_file, const std::string& model_directory,
                                   const runtime::ModelConfig& config, int64_t max_window);

// Longest window that the engine takes.
int64_t MaxWindow(const runtime::Engine& engine);

// Rank 0: queues the windows; everything that can be wrong with them comes out here.
absl::Status SubmitWindows(std::span<const TokenIds> windows, runtime::Engine& engine);

// Rank 0, collective with Engine::Follow: steps until nothing is queued. Returns the sum of -ln p
// over all predicted tokens. `on_tokens` hears how many positions each step ran.
absl::StatusOr<double> RunToIdle(runtime::Engine& engine,
                                 const std::function<void(int64_t)>& on_tokens);

}  // namespace ternion::launcher
