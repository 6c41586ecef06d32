#include "tests/emulator/emulator.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/emulator/threads.h"

constinit thread_local uint3 threadIdx, blockIdx;
constinit thread_local dim3 blockDim, gridDim;

struct ternion_emulated_graph {
  std::vector<std::function<void()>> work;
};
// What others do on it.
struct ternion_emulated_stream {
  std::vector<std::function<bool()>> work;
};
struct ternion_emulated_event {
  std::vector<std::function<bool()>> work;
};

namespace ternion::emulator {

void Fail(const char* what) {
  std::fprintf(stderr, "emulated device: %s\n", what);
  std::abort();
}

namespace {

// ---- Threads of a block: fibers that give way at barriers

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

void RunGrid(dim3 grid, dim3 threads, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads;
  block.body = &body;
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

// ---- Memory

// Addresses of one kind of memory: pages are added at the end, freed ranges used again.
class Arena {
 public:
  Arena() {
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) Fail("no address space");
    madvise(base_, kReserved, MADV_HUGEPAGE);  // access is opened and closed often
  }

  bool Holds(uintptr_t address) const {
    return address >= reinterpret_cast<uintptr_t>(base_) &&
           address <= reinterpret_cast<uintptr_t>(base_) + used_;
  }

  void* Allocate(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    for (auto [at, free_size] : free_) {
      if (free_size != size) continue;
      free_.erase(at);
      sizes_[at] = size;
      return at;
    }
    if (used_ + size > kReserved) return nullptr;
    uint8_t* const data = base_ + used_;
    used_ += size;
    sizes_[data] = size;
    SetAccess(open_);
    return data;
  }

  void Free(void* data) {
    const auto found = sizes_.find(static_cast<uint8_t*>(data));
    if (found == sizes_.end()) Fail("freed what was not allocated");
    free_.insert(*found);
    sizes_.erase(found);
  }

  void SetAccess(bool open) {
    open_ = open;
    if (used_ > 0) mprotect(base_, used_, open ? PROT_READ | PROT_WRITE : PROT_NONE);
  }

 private:
  static constexpr size_t kReserved = size_t{16} << 30;
  static constexpr size_t kPage = 4096;
  uint8_t* base_ = nullptr;
  size_t used_ = 0;
  bool open_ = false;
  std::map<uint8_t*, size_t> sizes_, free_;
};

// The one device of this process.
struct Device {
  std::recursive_mutex mutex;
  Arena memory, pinned;
  std::deque<std::function<void()>> queue;  // of all streams, in the order of submission
  ternion_emulated_graph* recording = nullptr;
  bool strict = true;
  int count = 1;
  std::deque<ternion_emulated_stream> streams;  // as long as the process

  Device() { pinned.SetAccess(true); }

  void Drain() {
    if (recording != nullptr) Fail("waited for while calls are recorded");
    if (queue.empty()) return;
    memory.SetAccess(true);
    for (; !queue.empty(); queue.pop_front()) queue.front()();
    if (strict) memory.SetAccess(false);
  }

  void Submit(std::function<void()> work) {
    if (recording != nullptr) return recording->work.push_back(std::move(work));
    queue.push_back(std::move(work));
    if (!strict) Drain();
  }
};

Device& TheDevice() {
  static Device* const device = new Device;
  return *device;
}

}  // namespace

void BlockBarrier() { WaitAt(block.barrier); }
void WarpBarrier() { WaitAt(block.warps[block.current->number / kWarpThreads].barrier); }
int LaneOfThread() { return block.current->number % kWarpThreads; }
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

cudaError_t Launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t num_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (num_threads == 0 || num_threads > 1024 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    Fail("a launch of a shape that no device takes");
  }
  Device& device = TheDevice();
  const std::lock_guard lock(device.mutex);
  device.Submit([=, body = std::move(thread)] { RunGrid(grid, threads, body); });
  return cudaSuccess;
}

void CheckBytes(const void* argument, size_t bytes) {
  Device& device = TheDevice();
  if (!device.strict) return;
  for (size_t i = 0; i + sizeof(uintptr_t) <= bytes; i += sizeof(uintptr_t)) {
    uintptr_t word;
    std::memcpy(&word, static_cast<const uint8_t*>(argument) + i, sizeof(word));
    // Where Linux puts programs, heaps, libraries and stacks; sizes and strides are smaller.
    const bool address = word >= 0x500000000000 && word <= 0x7fffffffffff;
    if (address && !device.memory.Holds(word) && !device.pinned.Holds(word)) {
      Fail("a kernel was given an address that the device does not reach");
    }
  }
}

void SetStrict(bool strict) {
  Device& device = TheDevice();
  const std::lock_guard lock(device.mutex);
  device.Drain();
  device.strict = strict;
  device.memory.SetAccess(!strict);
}

void SetDeviceCount(int count) {
  const std::lock_guard lock(TheDevice().mutex);
  TheDevice().count = count;
}

void CopyNow(void* to, const void* from, size_t bytes) {
  Device& device = TheDevice();
  const std::lock_guard lock(device.mutex);
  device.memory.SetAccess(true);
  std::memcpy(to, from, bytes);
  device.memory.SetAccess(!device.strict);
}

void AddToStream(cudaStream_t stream, std::function<bool()> is_done) {
  const std::lock_guard lock(TheDevice().mutex);
  stream->work.push_back(std::move(is_done));
}

namespace {

thread_local int chosen_device = 0;

cudaError_t Allocate(Arena& arena, void** data, size_t bytes) {
  const std::lock_guard lock(TheDevice().mutex);
  if (TheDevice().recording != nullptr) Fail("allocated while calls are recorded");
  *data = arena.Allocate(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

// What is freed may still be in use by what was launched.
cudaError_t Free(Arena& arena, void* data) {
  const std::lock_guard lock(TheDevice().mutex);
  TheDevice().Drain();
  if (data != nullptr) arena.Free(data);
  return cudaSuccess;
}

cudaError_t Do(std::function<void()> work, bool wait) {
  Device& device = TheDevice();
  const std::lock_guard lock(device.mutex);
  device.Submit(std::move(work));
  if (wait) device.Drain();
  return cudaSuccess;
}

}  // namespace
}  // namespace ternion::emulator

using ternion::emulator::chosen_device;
using ternion::emulator::TheDevice;

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                 ? "no error"
         : error == cudaErrorMemoryAllocation ? "out of memory"
                                              : "invalid argument";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(TheDevice().mutex);
  *count = TheDevice().count;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated device", 9, 0, 4, size_t{256} << 20};
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  chosen_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = chosen_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  std::snprintf(id, bytes, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, size_t bytes) {
  return ternion::emulator::Allocate(TheDevice().memory, data, bytes);
}
cudaError_t cudaFree(void* data) { return ternion::emulator::Free(TheDevice().memory, data); }
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  return ternion::emulator::Allocate(TheDevice().pinned, data, bytes);
}
cudaError_t cudaFreeHost(void* data) { return ternion::emulator::Free(TheDevice().pinned, data); }
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  return ternion::emulator::Do([=] { std::memset(data, value, bytes); }, true);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return ternion::emulator::Do([=] { std::memcpy(to, from, bytes); }, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return ternion::emulator::Do([=] { std::memcpy(to, from, bytes); }, false);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const std::lock_guard lock(TheDevice().mutex);
  *stream = &TheDevice().streams.emplace_back();
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new ternion_emulated_event;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(TheDevice().mutex);
  event->work = std::move(stream->work);  // whoever records another event waits for this one first
  stream->work.clear();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  for (const auto& is_done : event->work) {
    if (!is_done()) return cudaErrorNotReady;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const std::lock_guard lock(TheDevice().mutex);
  TheDevice().Drain();
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  const std::lock_guard lock(TheDevice().mutex);
  TheDevice().recording = new ternion_emulated_graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  const std::lock_guard lock(TheDevice().mutex);
  *graph = std::exchange(TheDevice().recording, nullptr);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, uint64_t) {
  *executable = new ternion_emulated_graph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  const std::lock_guard lock(TheDevice().mutex);
  for (const std::function<void()>& work : executable->work) TheDevice().Submit(work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const std::lock_guard lock(TheDevice().mutex);
  TheDevice().Drain();  // it may be under way
  delete executable;
  return cudaSuccess;
}
