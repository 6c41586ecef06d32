#include "tests/comm/counting_new.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<int64_t> num_allocations{0};
}  // namespace

void* operator new(size_t bytes) {
  ++num_allocations;
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
// What base::Buffer takes its memory from.
extern "C" void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  ++num_allocations;
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace ternion::comm {

int64_t NumAllocations() { return num_allocations; }

}  // namespace ternion::comm
