// Owned, aligned, zero-filled memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "base/memory.h"

namespace ternion::base {

// `bytes` of zeroed memory, 64-byte aligned. Move-only. Running out of memory is std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes, Memory& memory = HostMemory());
  // With anything in it, for those who write all of it.
  static Buffer Unset(size_t bytes, Memory& memory);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  const Memory* memory() const { return memory_; }

  // Moves what lies on the host into `memory`; nothing happens if that is the host's own.
  void MoveTo(Memory& memory);

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  Memory* memory_ = nullptr;
};

// A Buffer of `count` Ts. The host indexes it only where it reaches the memory.
template <typename T>
class Array {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Array() = default;
  explicit Array(size_t count, Memory& memory = HostMemory())
      : buffer_(count * sizeof(T), memory), count_(count) {}

  T* data() { return reinterpret_cast<T*>(buffer_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(buffer_.data()); }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  std::span<T> span() { return {data(), count_}; }
  std::span<const T> span() const { return {data(), count_}; }

  void MoveTo(Memory& memory) { buffer_.MoveTo(memory); }

 private:
  Buffer buffer_;
  size_t count_ = 0;
};

}  // namespace ternion::base
