#include <cuda_runtime.h>

#include <cstring>
#include <new>

#include "base/checked.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/memory.h"

namespace ternion::kernels {
namespace {

constexpr size_t kPieceAlignment = 256;
constexpr size_t kSlabBytes = size_t{256} << 20;
constexpr size_t kLargePiece = size_t{8} << 20;  // is CUDA's, with little lost to rounding

size_t SizeOfPiece(size_t bytes) {
  return (bytes + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
}

}  // namespace

// Null when there is no room.
uint8_t* DeviceMemory::TryAllocate(size_t bytes) {
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) == cudaSuccess) {
    allocated_bytes_ += static_cast<int64_t>(bytes);
    return static_cast<uint8_t*>(data);
  }
  cudaGetLastError();  // or the next launch would report it
  return nullptr;
}

uint8_t* DeviceMemory::AllocateUnset(size_t bytes) {
  cudaSetDevice(device_);  // threads that load weights have not chosen one yet
  uint8_t* const data = Take(SizeOfPiece(bytes));
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

uint8_t* DeviceMemory::Allocate(size_t bytes) {
  uint8_t* const data = AllocateUnset(bytes);
  cuda::Note(cudaMemset(data, 0, bytes));
  cudaDeviceSynchronize();  // streams of ours do not wait for it
  return data;
}

uint8_t* DeviceMemory::Take(size_t size) {
  if (size >= kLargePiece) return TryAllocate(size);
  const std::lock_guard lock(mutex_);
  std::vector<uint8_t*>& freed = freed_[size];
  if (freed.empty()) return TakeFromSlabs(size);
  uint8_t* const data = freed.back();
  freed.pop_back();
  return data;
}

uint8_t* DeviceMemory::TakeFromSlabs(size_t size) {
  for (Slab& slab : slabs_) {
    if (slab.bytes - slab.used < size) continue;
    slab.used += size;
    return slab.data + slab.used - size;
  }
  Slab slab = NewSlab(size);
  if (slab.data == nullptr) return nullptr;
  slab.used = size;
  slabs_.push_back(slab);
  return slab.data;
}

// Smaller where the device is almost full, but no smaller than a piece.
DeviceMemory::Slab DeviceMemory::NewSlab(size_t size) {
  for (size_t bytes = kSlabBytes; bytes >= size; bytes /= 2) {
    if (uint8_t* data = TryAllocate(bytes)) return {data, bytes, 0};
  }
  return {};
}

void DeviceMemory::Free(uint8_t* data, size_t bytes) {
  cudaSetDevice(device_);
  const size_t size = SizeOfPiece(bytes);
  if (size >= kLargePiece) {
    cudaFree(data);
    allocated_bytes_ -= static_cast<int64_t>(size);
    return;
  }
  cudaDeviceSynchronize();
  const std::lock_guard lock(mutex_);
  freed_[size].push_back(data);
}

void DeviceMemory::Write(const void* from, size_t bytes, void* to) {
  cudaSetDevice(device_);
  cuda::Note(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  cudaDeviceSynchronize();  // the copy may return while the last bytes are on their way
}

std::optional<int64_t> DeviceMemory::free_bytes() const {
  cudaSetDevice(device_);
  size_t free_bytes = 0, total_bytes = 0;
  if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) return std::nullopt;
  return static_cast<int64_t>(free_bytes);
}

uint8_t* StagingMemory::Allocate(size_t bytes) {
  void* data = nullptr;
  if (cudaHostAlloc(&data, bytes, cudaHostAllocDefault) != cudaSuccess) {
    cudaGetLastError();
    throw std::bad_alloc();
  }
  std::memset(data, 0, bytes);
  return static_cast<uint8_t*>(data);
}

void StagingMemory::Free(uint8_t* data, size_t) { cudaFreeHost(data); }

void StagingMemory::Write(const void* from, size_t bytes, void* to) {
  std::memcpy(to, from, bytes);
}

int64_t StagingMemory::capacity_bytes() const { return base::HostMemory().capacity_bytes(); }

}  // namespace ternion::kernels
