// The ops on a real device. All memory of this process is pinned memory of the host, which a device
// reaches: what tests allocate with `new`, and base::HostMemory.
#include <cuda_runtime.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/kernels/cuda_variant.h"

namespace ternion {
namespace {

// One block of pinned memory, dealt out in powers of two. Before Reserve, and beyond the block, it
// is plain memory. Thread-safe.
class PinnedBlock {
 public:
  // What went wrong, or null.
  const char* Reserve() {
    void* block = nullptr;
    const cudaError_t error = cudaHostAlloc(&block, kBytes, cudaHostAllocDefault);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    begin_ = static_cast<uint8_t*>(block);
    return nullptr;
  }

  void* Allocate(size_t bytes) {
    const size_t size = std::bit_ceil(bytes + kHeaderBytes);
    if (begin_ == nullptr) return std::malloc(bytes);
    const std::lock_guard lock(mutex_);
    uint8_t*& free = free_[std::countr_zero(size)];
    uint8_t* data = free;
    if (data != nullptr) {
      std::memcpy(&free, data, sizeof(free));  // the next one
    } else {
      if (used_ + size > kBytes) return std::malloc(bytes);
      data = begin_ + used_ + kHeaderBytes;
      used_ += size;
    }
    std::memcpy(data - kHeaderBytes, &size, sizeof(size));
    return data;
  }

  void Free(void* memory) {
    uint8_t* const data = static_cast<uint8_t*>(memory);
    if (begin_ == nullptr || data < begin_ || data >= begin_ + kBytes) return std::free(memory);
    const std::lock_guard lock(mutex_);
    size_t size;
    std::memcpy(&size, data - kHeaderBytes, sizeof(size));
    uint8_t*& free = free_[std::countr_zero(size)];
    std::memcpy(data, &free, sizeof(free));
    free = data;
  }

 private:
  static constexpr size_t kBytes = size_t{4} << 30;
  static constexpr size_t kHeaderBytes = 64;  // that memory stays aligned
  std::mutex mutex_;
  uint8_t* begin_ = nullptr;
  size_t used_ = 0;
  uint8_t* free_[64] = {};  // [log2 of the size] the first of a list
};

constinit PinnedBlock block;

class NeedsDevice : public testing::Environment {
  void SetUp() override {
    setenv("CUDA_LAUNCH_BLOCKING", "1", 1);  // an op is done when it returns; CUDA reads it once
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no GPU here: " << cudaGetErrorString(error);
    }
    if (const char* why = block.Reserve()) FAIL() << "pinned memory: " << why;
  }
};
[[maybe_unused]] const auto* const environment = testing::AddGlobalTestEnvironment(new NeedsDevice);

class PinnedMemory : public base::Memory {
 public:
  uint8_t* Allocate(size_t bytes) override {
    return static_cast<uint8_t*>(std::memset(::operator new(bytes), 0, bytes));
  }
  void Free(uint8_t* data, size_t) override { ::operator delete(data); }
  void Write(const void* from, size_t bytes, void* to) override { std::memcpy(to, from, bytes); }
  int64_t capacity_bytes() const override { return 0; }
};

}  // namespace

// In place of base/memory.cc.
base::Memory& base::HostMemory() {
  static PinnedMemory* const memory = new PinnedMemory;
  return *memory;
}

const kernels::Kernels* kernels::CudaVariant(Executor& executor) {
  static Executor of_device;
  static std::string why;
  static const Kernels* const table = SelectCudaKernels(0, of_device, &why);
  EXPECT_NE(table, nullptr) << why;
  executor = of_device;
  executor.threads = nullptr;  // no op may use them
  return table;
}

bool kernels::UseWarpgroups(bool wanted) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  return (major == 9) == wanted;
}

}  // namespace ternion

void* operator new(size_t bytes) {
  if (void* memory = ternion::block.Allocate(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { ternion::block.Free(memory); }
void operator delete(void* memory, size_t) noexcept { ternion::block.Free(memory); }
