#include "base/buffer.h"

namespace ternion::base {

Buffer::Buffer(size_t bytes, Memory& memory)
    : data_(bytes == 0 ? nullptr : memory.Allocate(bytes)), size_(bytes), memory_(&memory) {}

Buffer Buffer::Unset(size_t bytes, Memory& memory) {
  Buffer buffer;
  if (bytes > 0) buffer.data_ = memory.AllocateUnset(bytes);
  buffer.size_ = bytes;
  buffer.memory_ = &memory;
  return buffer;
}

Buffer::~Buffer() {
  if (data_ != nullptr) memory_->Free(data_, size_);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(memory_, other.memory_);
  return *this;
}

void Buffer::MoveTo(Memory& memory) {
  if (size_ == 0 || &memory == memory_) return;
  Buffer moved = Unset(size_, memory);
  memory.Write(data_, size_, moved.data_);
  *this = std::move(moved);
}

}  // namespace ternion::base
