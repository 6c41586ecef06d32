#include "base/memory.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "base/checked.h"

namespace ternion::base {
namespace {

constexpr size_t kCacheLineBytes = 64;
constexpr size_t kHugePageBytes = size_t{2} << 20;

// One huge page more than needed is mapped and trimmed, so that the start is 2 MiB aligned.
uint8_t* MapHugePages(size_t bytes) {
  const size_t rounded = RoundUp(bytes, kHugePageBytes);
  const size_t reserved = rounded + kHugePageBytes;
  void* mapped =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  uint8_t* start = static_cast<uint8_t*>(mapped);
  uint8_t* aligned = reinterpret_cast<uint8_t*>(
      RoundUp(reinterpret_cast<intptr_t>(start), static_cast<int64_t>(kHugePageBytes)));
  if (aligned > start) munmap(start, aligned - start);
  uint8_t* end = start + reserved;
  if (end > aligned + rounded) munmap(aligned + rounded, end - (aligned + rounded));
  madvise(aligned, rounded, MADV_HUGEPAGE);  // advice: plain pages still work
  return aligned;
}

uint8_t* AllocateLines(size_t bytes) {
  const size_t rounded = RoundUp(bytes, kCacheLineBytes);
  void* data = std::aligned_alloc(kCacheLineBytes, rounded);
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, rounded);
  return static_cast<uint8_t*>(data);
}

class Host : public Memory {
 public:
  uint8_t* Allocate(size_t bytes) override {
    uint8_t* const data = bytes >= kHugePageBytes ? MapHugePages(bytes) : AllocateLines(bytes);
    allocated_bytes_ += static_cast<int64_t>(bytes);
    return data;
  }

  void Free(uint8_t* data, size_t bytes) override {
    allocated_bytes_ -= static_cast<int64_t>(bytes);
    if (bytes >= kHugePageBytes) {
      munmap(data, RoundUp(bytes, kHugePageBytes));
    } else {
      std::free(data);
    }
  }

  void Write(const void* from, size_t bytes, void* to) override { std::memcpy(to, from, bytes); }

  int64_t capacity_bytes() const override {
    struct sysinfo info;
    return sysinfo(&info) == 0 ? static_cast<int64_t>(info.totalram) * info.mem_unit : 0;
  }
  int64_t allocated_bytes() const override { return allocated_bytes_; }

 private:
  std::atomic<int64_t> allocated_bytes_ = 0;
};

}  // namespace

Memory& HostMemory() {
  static Host* const host = new Host;  // outlives every static that holds memory
  return *host;
}

}  // namespace ternion::base
