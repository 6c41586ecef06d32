#include "base/thread_pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include "base/check.h"

namespace ternion::base {
namespace {

// Polls before sleeping: about 10 us, longer than the gap between two ops of one layer.
constexpr int kSpinPolls = 400;

void PinToCpu(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);  // a hint: failing leaves it unpinned
}

// Waits until *value differs from `seen`.
template <typename T>
void WaitWhile(std::atomic<T>& value, T seen, bool may_spin) {
  for (int i = 0; may_spin && i < kSpinPolls; ++i) {
    if (value.load(std::memory_order_acquire) != seen) return;
    _mm_pause();
  }
  while (value.load(std::memory_order_acquire) == seen) value.wait(seen);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus)
    : num_threads_(num_threads), scratch_(num_threads * kScratchBytesPerThread) {
  TERNION_CHECK(num_threads >= 1);
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { WorkerLoop(i); });
  if (cpus.empty()) return;
  PinToCpu(pthread_self(), cpus[0]);
  for (int i = 1; i < num_threads; ++i) {
    PinToCpu(workers_[i - 1].native_handle(), cpus[i % cpus.size()]);
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunErased(Body body, void* context) {
  if (num_threads_ == 1) return body(context, 0);
  body_ = body;
  context_ = context;
  running_.store(num_threads_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  body(context, 0);
  for (int left; (left = running_.load(std::memory_order_acquire)) != 0;) {
    WaitWhile(running_, left, true);
  }
}

void ThreadPool::WorkerLoop(int thread) {
  uint32_t seen = 0;
  while (true) {
    WaitWhile(generation_, seen, true);
    ++seen;
    if (stop_) return;
    body_(context_, thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

std::vector<int> AllowedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace ternion::base
