// What a rank does while it polls.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <chrono>

namespace ternion::comm {

// Spends the time between two polls: first not at all, then by letting others run, then asleep, the
// longer the more time passed already, so that a wait becomes at most an eighth longer. Sleeping
// starts late: where ranks outnumber cores, who slept may get its core back some milliseconds
// later.
class Backoff {
 public:
  // From now on, waiting is new.
  void Restart() { start_ = Clock::now(); }

  // Returns whether it slept.
  bool Wait() const {
    constexpr std::chrono::microseconds kSpin(20), kYield(1000);
    constexpr std::chrono::nanoseconds kLongestSleep(500'000);
    const std::chrono::nanoseconds idle = Clock::now() - start_;
    if (idle < kSpin) return false;
    if (idle < kYield) {
      sched_yield();
      return false;
    }
    const timespec pause{0, std::min(idle / 8, kLongestSleep).count()};
    nanosleep(&pause, nullptr);
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Clock::time_point start_ = Clock::now();
};

}  // namespace ternion::comm
