// The memories of a device: its own, and the host's that it reaches.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "base/memory.h"

namespace ternion::kernels {

// Memory of one device. CUDA rounds what it is asked for up to 2 MiB, and an expert's matrix may
// have 3: smaller pieces are cut from slabs.
class DeviceMemory : public base::Memory {
 public:
  DeviceMemory(int device, size_t capacity_bytes, int num_devices = 1)
      : device_(device), capacity_bytes_(capacity_bytes), num_devices_(num_devices) {}

  uint8_t* Allocate(size_t bytes) override;
  // Waits for nothing. The thread may call ops on this device from then on.
  uint8_t* AllocateUnset(size_t bytes) override;
  // Ops that were called before may still use it: waits for them.
  void Free(uint8_t* data, size_t bytes) override;
  void Write(const void* from, size_t bytes, void* to) override;
  int64_t capacity_bytes() const override { return static_cast<int64_t>(capacity_bytes_); }
  int num_alike() const override { return num_devices_; }
  int64_t allocated_bytes() const override { return allocated_bytes_; }  // slabs count whole
  std::optional<int64_t> free_bytes() const override;

 private:
  struct Slab {
    uint8_t* data = nullptr;
    size_t bytes = 0;
    size_t used = 0;
  };

  uint8_t* TryAllocate(size_t bytes);
  uint8_t* Take(size_t size);
  uint8_t* TakeFromSlabs(size_t size);
  Slab NewSlab(size_t size);

  const int device_;
  const size_t capacity_bytes_;
  const int num_devices_;
  std::atomic<int64_t> allocated_bytes_ = 0;
  std::mutex mutex_;
  std::vector<Slab> slabs_;                        // as long as this
  std::map<size_t, std::vector<uint8_t*>> freed_;  // [size] pieces to use again
};

// Pinned memory of the host, which devices read and write over the bus.
class StagingMemory : public base::Memory {
 public:
  uint8_t* Allocate(size_t bytes) override;
  void Free(uint8_t* data, size_t bytes) override;
  void Write(const void* from, size_t bytes, void* to) override;
  int64_t capacity_bytes() const override;
};

}  // namespace ternion::kernels
