// Owned, aligned, zero-filled host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

namespace ternion::base {

// `bytes` of zeroed memory from anonymous pages: 64-byte aligned, 2 MiB aligned and advised to be
// huge pages when it is that large (plain pages cost a streaming kernel up to half of its speed).
// Move-only. Running out of memory is std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_bytes_ = 0;  // 0: from the heap
};

// A Buffer of `count` Ts.
template <typename T>
class Array {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Array() = default;
  explicit Array(size_t count) : buffer_(count * sizeof(T)), count_(count) {}

  T* data() { return reinterpret_cast<T*>(buffer_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(buffer_.data()); }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  std::span<T> span() { return {data(), count_}; }
  std::span<const T> span() const { return {data(), count_}; }

 private:
  Buffer buffer_;
  size_t count_ = 0;
};

// Bytes of memory that this machine has; 0 if it does not tell.
int64_t MemoryBytes();

}  // namespace ternion::base
