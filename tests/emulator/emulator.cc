// The device: its memories, its streams and graphs, and the calls of the runtime.
#include "tests/emulator/emulator.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/emulator/threads.h"

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

constexpr size_t kDeviceBytes = size_t{256} << 20;

namespace {

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

  size_t allocated_bytes() const {
    size_t sum = 0;
    for (const auto& [at, size] : sizes_) sum += size;
    return sum;
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
  bool refuses = false;  // launches
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

cudaError_t Launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t num_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (num_threads == 0 || num_threads > 1024 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    Fail("a launch of a shape that no device takes");
  }
  Device& device = TheDevice();
  const std::lock_guard lock(device.mutex);
  if (device.refuses) return cudaErrorInvalidValue;
  const bool early = config.numAttrs > 0;
  device.Submit([=, body = std::move(thread)] { RunGrid(grid, threads, early, body); });
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

void RefuseLaunches() {
  const std::lock_guard lock(TheDevice().mutex);
  TheDevice().refuses = true;
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
using ternion::emulator::kDeviceBytes;
using ternion::emulator::TheDevice;

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                 ? "no error"
         : error == cudaErrorMemoryAllocation ? "out of memory"
                                              : "invalid argument";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(TheDevice().mutex);
  *count = TheDevice().count;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated device", 9, 0, 4, kDeviceBytes};
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
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
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
// Of this process, which may take more than the device is said to have.
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const std::lock_guard lock(TheDevice().mutex);
  *total_bytes = kDeviceBytes;
  *free_bytes = kDeviceBytes - std::min(kDeviceBytes, TheDevice().memory.allocated_bytes());
  return cudaSuccess;
}
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
