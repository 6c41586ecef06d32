#include "base/thread_pool.h"

#include <atomic>
#include <memory>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::base {
namespace {

class ThreadPoolTest : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, RunCallsEachThreadOnceEveryTime) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.num_threads(), GetParam());
  std::vector<int> calls(GetParam());  // written without synchronization: Run must provide it
  for (int round = 1; round <= 2000; ++round) {
    pool.Run([&](int thread) { ++calls[thread]; });
    for (int count : calls) ASSERT_EQ(count, round);
  }
}

TEST_P(ThreadPoolTest, CallerIsThreadZero) {
  ThreadPool pool(GetParam());
  std::vector<std::thread::id> ids(GetParam());
  pool.Run([&](int thread) { ids[thread] = std::this_thread::get_id(); });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  EXPECT_EQ(std::set<std::thread::id>(ids.begin(), ids.end()).size(), ids.size());
}

TEST_P(ThreadPoolTest, ParallelForCoversEachIndexOnce) {
  ThreadPool pool(GetParam());
  for (const int64_t count : {0, 1, 2, 3, 7, 64, 1001}) {
    for (const int64_t min_per_thread : {0, 1, 10, 5000}) {
      std::vector<int> visits(count);
      std::atomic<int> calls = 0;
      pool.ParallelFor(count, min_per_thread, [&](int64_t begin, int64_t end, int thread) {
        EXPECT_LT(begin, end);
        EXPECT_LT(thread, GetParam());
        ++calls;
        for (int64_t i = begin; i < end; ++i) ++visits[i];
      });
      EXPECT_EQ(visits, std::vector<int>(count, 1)) << count << " " << min_per_thread;
      if (count < 2 * min_per_thread) {
        EXPECT_EQ(calls, count > 0);
      }
    }
  }
}

// Work that sleeps between runs takes the path through the futex.
TEST_P(ThreadPoolTest, WakesAfterIdling) {
  ThreadPool pool(GetParam());
  std::atomic<int> calls = 0;
  for (int round = 1; round <= 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than workers spin
    pool.Run([&](int) { ++calls; });
    ASSERT_EQ(calls, round * GetParam());
  }
}

TEST_P(ThreadPoolTest, ScratchIsPrivateAndAligned) {
  ThreadPool pool(GetParam());
  pool.Run([&](int thread) {
    uint8_t* scratch = pool.scratch(thread);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(scratch) % 64, 0u);
    std::fill_n(scratch, kScratchBytesPerThread, static_cast<uint8_t>(thread + 1));
  });
  for (int thread = 0; thread < GetParam(); ++thread) {
    const uint8_t* scratch = pool.scratch(thread);
    EXPECT_EQ(scratch[0], thread + 1);
    EXPECT_EQ(scratch[kScratchBytesPerThread - 1], thread + 1);
  }
}

TEST_P(ThreadPoolTest, StartsAndStops) {
  for (int round = 0; round < 20; ++round) {
    ThreadPool pool(GetParam());
    if (round % 2 == 0) continue;  // also without any work
    std::atomic<int> calls = 0;
    pool.Run([&](int) { ++calls; });
    ASSERT_EQ(calls, GetParam());
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, testing::Values(1, 2, 3, 8));

TEST(ThreadPool, PinsToAllowedCpus) {
  const std::vector<int> cpus = AllowedCpus();
  ASSERT_FALSE(cpus.empty());
  std::vector<int> ran_on(2, -1);
  std::thread([&] {  // pinning outlives the pool: keep it off the test's own thread
    ThreadPool pool(2, {cpus.front()});
    pool.Run([&](int thread) { ran_on[thread] = sched_getcpu(); });
  })
      .join();
  EXPECT_EQ(ran_on, std::vector<int>(2, cpus.front()));
}

}  // namespace
}  // namespace ternion::base
