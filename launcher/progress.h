// A progress bar on a terminal, a few plain lines elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace ternion::launcher {

// Draws to stderr. Silent when constructed with `enabled` false (ranks other than 0).
class ProgressBar {
 public:
  ProgressBar(std::string label, bool enabled);
  ~ProgressBar();

  // `done` of `total`, any unit. Redraws at most 20 times a second.
  void Update(int64_t done, int64_t total);

 private:
  void Draw(int64_t done, int64_t total);

  const std::string label_;
  const bool enabled_;
  const bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_draw_{};
};

}  // namespace ternion::launcher
