// Where memory lies: on the host, on a device, or on the host where a device reaches it too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>

namespace ternion::base {

// Outlives what it has allocated. Thread-safe. Standard containers of host memory take it as their
// resource: std::pmr::vector<int> ids(&memory).
class Memory : public std::pmr::memory_resource {
 public:
  // `bytes` > 0, zeroed and 64-byte aligned. Running out is std::bad_alloc.
  virtual uint8_t* Allocate(size_t bytes) = 0;
  // The same with anything in it, for those who write all of it.
  virtual uint8_t* AllocateUnset(size_t bytes) { return Allocate(bytes); }
  virtual void Free(uint8_t* data, size_t bytes) = 0;

  // From the host to `to` in this memory. Returns when the bytes are there.
  virtual void Write(const void* from, size_t bytes, void* to) = 0;

  // How much there is, in use or not; 0 if it does not tell.
  virtual int64_t capacity_bytes() const = 0;
  // How many such memories this machine has; its ranks take one each, in turn.
  virtual int num_alike() const { return 1; }
  // Of it, what this object has taken and not given back; 0 if it does not tell.
  virtual int64_t allocated_bytes() const { return 0; }
  // What nobody has taken, other programs included; none if it does not tell.
  virtual std::optional<int64_t> free_bytes() const { return std::nullopt; }

 private:
  void* do_allocate(size_t bytes, size_t) final { return Allocate(bytes > 0 ? bytes : 1); }
  void do_deallocate(void* data, size_t bytes, size_t) final {
    Free(static_cast<uint8_t*>(data), bytes > 0 ? bytes : 1);
  }
  bool do_is_equal(const memory_resource& other) const noexcept final { return this == &other; }
};

// Anonymous pages; 2 MiB aligned and advised to be huge pages from that size on (plain pages cost a
// streaming kernel up to half of its speed).
Memory& HostMemory();

}  // namespace ternion::base
