// Threads of a block, which are fibers that give way at barriers.
#include "tests/emulator/threads.h"

#include <cuda_runtime.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

constinit thread_local uint3 threadIdx, blockIdx;
constinit thread_local dim3 blockDim, gridDim;

namespace ternion::emulator {

void Fail(const char* what) {
  std::fprintf(stderr, "emulated device: %s\n", what);
  std::abort();
}

namespace {

constexpr int kWarpThreads = 32;
constexpr size_t kStackBytes = 64 << 10;

extern "C" void ternion_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl ternion_emulator_switch
.type ternion_emulator_switch, @function
ternion_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ternion_emulator_switch, . - ternion_emulator_switch
)");

// Waits until all live threads have arrived.
struct Barrier {
  int live = 0;
  int arrived = 0;
  uint64_t round = 0;

  void Release() {
    arrived = 0;
    ++round;
  }
  void Leave() {
    if (--live > 0 && arrived == live) Release();
  }
};

struct Warp {
  Barrier barrier;
  uint32_t given[2][kWarpThreads][kWords] = {};  // by turns: nobody writes what is being read
};

struct Fiber {
  std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
  void* stack_pointer = nullptr;
  void* frames = nullptr;  // the address sanitizer's
  uint3 index;
  int number = 0;
  uint64_t exchanges = 0;
  Async async;
  const Barrier* waits_for = nullptr;
  uint64_t round = 0;
  bool awaited = false;  // ops before
  bool done = false;
};

// A stack that is not running, as the address sanitizer knows it.
struct Stack {
  void* pointer = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* frames = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int num_threads = 0;
  bool early = false;
  Barrier barrier;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  Stack scheduler;
};

thread_local Block block;
thread_local const uint8_t* shared_memory;  // of which an address was asked the last time

// On each side of a switch the sanitizer hears of it.
void Leave([[maybe_unused]] void** frames, [[maybe_unused]] const void* bottom,
           [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(frames, bottom, bytes);
#endif
}
void Arrive([[maybe_unused]] void* frames, [[maybe_unused]] Stack* from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(frames, &bottom, &bytes);
  if (from != nullptr) from->bottom = bottom, from->bytes = bytes;
#endif
}

void Resume(Fiber& fiber) {
  block.current = &fiber;
  threadIdx = fiber.index;
  Leave(&block.scheduler.frames, fiber.stack.get(), kStackBytes);
  ternion_emulator_switch(&block.scheduler.pointer, fiber.stack_pointer);
  Arrive(block.scheduler.frames, nullptr);
}

void Yield() {
  Fiber& self = *block.current;
  Leave(&self.frames, block.scheduler.bottom, block.scheduler.bytes);
  ternion_emulator_switch(&self.stack_pointer, block.scheduler.pointer);
  Arrive(self.frames, &block.scheduler);
}

void FiberMain() {
  Arrive(nullptr, &block.scheduler);
  Fiber& self = *block.current;
  (*block.body)();
  if (block.early && !self.awaited) Fail("a thread did not wait for the ops before its own");
  if (!self.async.products.empty()) Fail("a thread ended with products under way");
  self.done = true;
  block.warps[self.number / kWarpThreads].barrier.Leave();
  block.barrier.Leave();
  Yield();
  Fail("a thread went on after its end");
}

void WaitAt(Barrier& barrier) {
  if (++barrier.arrived == barrier.live) return barrier.Release();
  Fiber& self = *block.current;
  self.waits_for = &barrier;
  self.round = barrier.round;
  Yield();
  self.waits_for = nullptr;
}

void Prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);  // what the last one left
#endif
  // As if FiberMain's first instruction had just been called: 8 bytes past a multiple of 16.
  const uintptr_t top =
      reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
  void** slots = reinterpret_cast<void**>(top) - 2;
  slots[0] = reinterpret_cast<void*>(&FiberMain);
  fiber.stack_pointer = slots - 6;  // registers that the switch restores
  fiber.exchanges = 0;
  fiber.async = Async();
  fiber.waits_for = nullptr;
  fiber.awaited = false;
  fiber.done = false;
}

bool CanGoOn(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || fiber.waits_for->round != fiber.round);
}

// Each thread as far as it comes; whether one came further.
bool RunWarp(int begin, int end) {
  bool progress = false;
  for (int i = begin; i < end; ++i) {
    if (!CanGoOn(block.fibers[i])) continue;
    Resume(block.fibers[i]);
    progress = true;
  }
  return progress;
}

void RunBlock(int num_threads) {
  block.fibers.resize(std::max<size_t>(block.fibers.size(), num_threads));
  block.warps.assign((num_threads + kWarpThreads - 1) / kWarpThreads, Warp());
  block.num_threads = num_threads;
  block.barrier = {.live = num_threads};
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = block.fibers[i];
    const unsigned n = i;
    fiber.number = i;
    fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    ++block.warps[i / kWarpThreads].barrier.live;
    Prepare(fiber);
  }
  // By turns up and down the warps, so that each is far ahead of some that it may have to wait for.
  const int num_warps = static_cast<int>(block.warps.size());
  bool progress = true;
  for (int round = 0; block.barrier.live > 0; ++round) {
    if (!progress) Fail("a barrier that some threads never reach");
    progress = false;
    for (int i = 0; i < num_warps; ++i) {
      const int warp = round % 2 == 0 ? i : num_warps - 1 - i;
      while (RunWarp(warp * kWarpThreads, std::min((warp + 1) * kWarpThreads, num_threads))) {
        progress = true;
      }
    }
  }
}

}  // namespace

void RunGrid(dim3 grid, dim3 threads, bool early, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads;
  block.body = &body;
  block.early = early;
  const int num_threads = static_cast<int>(threads.x * threads.y * threads.z);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        RunBlock(num_threads);
      }
    }
  }
}

void BlockBarrier() { WaitAt(block.barrier); }
void WarpBarrier() { WaitAt(block.warps[block.current->number / kWarpThreads].barrier); }
int LaneOfThread() { return block.current->number % kWarpThreads; }
void AwaitOpsBefore() { block.current->awaited = true; }
Async& AsyncOfThread() { return block.current->async; }
uint64_t RoundOfBlock() { return block.barrier.round; }

bool AllShown() {
  const auto shown = [](const Fiber& fiber) {
    return fiber.async.shown_in_round + 1 >= block.barrier.round;
  };
  return std::all_of(block.fibers.begin(), block.fibers.begin() + block.num_threads, shown);
}

WordsOfWarp ExchangeWords(const uint32_t (&words)[kWords]) {
  Fiber& self = *block.current;
  Warp& warp = block.warps[self.number / kWarpThreads];
  auto* const given = warp.given[self.exchanges++ % 2];
  std::copy(words, words + kWords, given[self.number % kWarpThreads]);
  WaitAt(warp.barrier);
  return given;
}

size_t AddressOfShared(const void* data) {
  shared_memory = static_cast<const uint8_t*>(data);
  return reinterpret_cast<uintptr_t>(data) & 0xffffffff;
}

const uint8_t* SharedMemoryAt(int64_t address) {
  constexpr int64_t kWindow = 1 << 18;
  const int64_t ahead =
      (address - static_cast<int64_t>(reinterpret_cast<uintptr_t>(shared_memory))) & (kWindow - 1);
  return shared_memory + (ahead < kWindow / 2 ? ahead : ahead - kWindow);
}

}  // namespace ternion::emulator
