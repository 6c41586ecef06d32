// The threads of one rank: fork-join over a fixed set of workers.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "base/buffer.h"

namespace ternion::base {

// Bytes of scratch each thread owns for the length of one Run. Sized for a GEMM block that stays in
// L2.
inline constexpr size_t kScratchBytesPerThread = size_t{1} << 20;

// Owned by the rank worker; used by one caller at a time. The caller is thread 0 and works too.
// Idle workers spin briefly, then sleep, so that oversubscribed ranks do not steal each other's
// cores.
class ThreadPool {
 public:
  // `cpus`: CPU numbers to pin threads to, in order; empty leaves placement to the kernel.
  explicit ThreadPool(int num_threads, std::vector<int> cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(thread) once on each of num_threads() threads and waits for all. Must not nest.
  template <typename F>
  void Run(F&& body) {
    using Body = std::remove_reference_t<F>;
    RunErased([](void* context, int thread) { (*static_cast<Body*>(context))(thread); },
              const_cast<void*>(static_cast<const void*>(&body)));
  }

  // Splits [0, count) into one contiguous range per thread: body(begin, end, thread). Ranges are a
  // function of count and num_threads alone. Small counts run on the caller.
  template <typename F>
  void ParallelFor(int64_t count, int64_t min_per_thread, F&& body) {
    const int64_t wanted = min_per_thread > 0 ? count / min_per_thread : count;
    if (num_threads_ == 1 || wanted < 2) {
      if (count > 0) body(int64_t{0}, count, 0);
      return;
    }
    Run([&](int thread) {
      const int64_t begin = count * thread / num_threads_;
      const int64_t end = count * (thread + 1) / num_threads_;
      if (begin < end) body(begin, end, thread);
    });
  }

  // kScratchBytesPerThread of 64-byte aligned memory, private to `thread` during one Run.
  uint8_t* scratch(int thread) { return scratch_.data() + thread * kScratchBytesPerThread; }

 private:
  using Body = void (*)(void* context, int thread);

  void RunErased(Body body, void* context);
  void WorkerLoop(int thread);

  const int num_threads_;
  Buffer scratch_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> generation_{0};  // one more per Run; wakes the workers
  std::atomic<int> running_{0};          // workers still inside body_
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

// CPUs this process may run on, in ascending order.
std::vector<int> AllowedCpus();

}  // namespace ternion::base
