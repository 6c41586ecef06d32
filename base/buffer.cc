#include "base/buffer.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "base/checked.h"

namespace ternion::base {
namespace {

constexpr size_t kCacheLineBytes = 64;
constexpr size_t kHugePageBytes = size_t{2} << 20;

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes < kHugePageBytes) {
    const size_t rounded = RoundUp(bytes, kCacheLineBytes);
    data_ = static_cast<uint8_t*>(std::aligned_alloc(kCacheLineBytes, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, rounded);
    return;
  }
  // Map one huge page more than needed and trim, so that the start is 2 MiB aligned.
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
  data_ = aligned;
  mapped_bytes_ = rounded;
}

Buffer::~Buffer() {
  if (mapped_bytes_ > 0) {
    munmap(data_, mapped_bytes_);
  } else {
    std::free(data_);
  }
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  return *this;
}

int64_t MemoryBytes() {
  struct sysinfo info;
  return sysinfo(&info) == 0 ? static_cast<int64_t>(info.totalram) * info.mem_unit : 0;
}

}  // namespace ternion::base
