#include "launcher/progress.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

namespace ternion::launcher {
namespace {

constexpr int kBarColumns = 30;

}  // namespace

ProgressBar::ProgressBar(std::string label, bool enabled)
    : label_(std::move(label)), enabled_(enabled), terminal_(isatty(STDERR_FILENO) != 0) {}

ProgressBar::~ProgressBar() {
  if (drawn_) std::fputs("\r\033[K", stderr);  // the bar has done its work
}

void ProgressBar::Update(int64_t done, int64_t total) {
  if (!enabled_ || !terminal_ || total <= 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (drawn_ && done < total && now - last_draw_ < std::chrono::milliseconds(50)) return;
  last_draw_ = now;
  Draw(done, total);
}

void ProgressBar::Draw(int64_t done, int64_t total) {
  const int filled = static_cast<int>(done * kBarColumns / total);
  const std::string bar = std::string(filled, '#') + std::string(kBarColumns - filled, '.');
  std::fprintf(stderr, "\r%s [%s] %3d%%", label_.c_str(), bar.c_str(),
               static_cast<int>(done * 100 / total));
  std::fflush(stderr);
  drawn_ = true;
}

}  // namespace ternion::launcher
