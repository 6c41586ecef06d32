// What a thread of the emulated device starts and then waits for: copies to shared memory (PTX ISA,
// cp.async) and products of warpgroups (wgmma). Names are those of kernels/cuda/ptx.cuh.
//
// Either is done when it is waited for, as late as it may; but as a device may be earlier, the
// destination of a copy holds nonsense meanwhile, and the operands of a product must still be what
// they were when it was started, or the process ends with a message. So it shows when something is
// read before it is there, or overwritten while it is in use.
#pragma once

#include <cstdint>
#include <vector>

namespace ternion::emulator {

struct Copy {
  const void* from = nullptr;
  void* to = nullptr;
  int bytes = 0;
  int group = 0;
};

struct Product {
  const uint32_t* a = nullptr;  // [4] of this thread
  uint32_t first_a[4] = {};     // what they were at the start
  const uint8_t* b = nullptr;
  int64_t to_next_chunk = 0, to_next_core = 0;  // in bytes
  uint64_t first_b = 0;                         // a hash
  int32_t* d = nullptr;                         // [columns / 8][4] of this thread
  int columns = 0;
  int group = 0;
};

// Of one thread.
struct Async {
  std::vector<Copy> copies;
  std::vector<Product> products;
  int copy_group = 0, product_group = 0;  // of what is started next
  bool products_begun = false;
  uint64_t shown_in_round = ~uint64_t{0};  // of the block's barrier
};

// What every thread of a kernel that may start early calls.
void AwaitOpsBefore();

void StartCopy(const void* from, void* to, int bytes);
void EndCopies();
void WaitForCopies(int left);

bool HasWarpgroups();
void ShowSharedToProducts();
void BeginProducts();
void StartProduct(const uint32_t* a, uint64_t b, int32_t* d, int columns);
void EndProducts();
void WaitForProducts(int left);

}  // namespace ternion::emulator
