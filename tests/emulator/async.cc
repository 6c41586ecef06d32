#include "tests/emulator/async.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "tests/emulator/emulator.h"
#include "tests/emulator/threads.h"

namespace ternion::emulator {
namespace {

constexpr int kCoreRows = 8;
constexpr int kChunk = 16;  // bytes of a core's row, and columns
constexpr int kChunks = 2;  // of a product

bool has_warpgroups = true;

const uint8_t* RowOfB(const Product& product, int column, int chunk) {
  return product.b + chunk * product.to_next_chunk + column / kCoreRows * product.to_next_core +
         column % kCoreRows * kChunk;
}

uint64_t HashOfB(const Product& product) {
  uint64_t hash = 0;
  for (int column = 0; column < product.columns; ++column) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint64_t words[2];
      std::memcpy(words, RowOfB(product, column, chunk), sizeof(words));
      for (uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15 + (hash >> 29);
    }
  }
  return hash;
}

// Rows g and g + 8 of A from the words of all threads, as MultiplyTile has them.
struct RowsOfA {
  int8_t row[2][kChunks][kChunk];

  RowsOfA(WordsOfWarp all, int g) {
    for (int q = 0; q < 4; ++q) {
      for (int i = 0; i < 4; ++i) std::memcpy(&row[i % 2][i / 2][4 * q], &all[4 * g + q][i], 4);
    }
  }
};

int32_t Dot(const int8_t* a, const uint8_t* b) {
  int32_t sum = 0;
  for (int k = 0; k < kChunk; ++k) sum += a[k] * static_cast<int8_t>(b[k]);
  return sum;
}

void Finish(const Product& product) {
  if (!std::equal(product.first_a, product.first_a + 4, product.a)) {
    Fail("registers of a product under way were changed");
  }
  if (LaneOfThread() == 0 && HashOfB(product) != product.first_b) {
    Fail("shared memory of a product under way was changed");
  }
  uint32_t own[kWords] = {};
  std::copy(product.a, product.a + 4, own);
  const RowsOfA a(ExchangeWords(own), LaneOfThread() / 4);
  for (int n = 0; n < product.columns / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * n + 2 * (LaneOfThread() % 4) + i % 2;
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        product.d[4 * n + i] += Dot(a.row[i / 2][chunk], RowOfB(product, column, chunk));
      }
    }
  }
}

// Bits 0 .. 13 of a descriptor, 16 .. 29 and 32 .. 45, in units of 16 bytes.
int64_t FieldOf(uint64_t descriptor, int bit) {
  return static_cast<int64_t>(descriptor >> bit & 0x3fff) * 16;
}

// Calls f with those of all groups but the last `left` and takes them out.
template <typename T, typename F>
void ForAllBut(int left, int next_group, std::vector<T>& started, F f) {
  const auto stay = std::find_if(started.begin(), started.end(),
                                 [&](const T& one) { return one.group >= next_group - left; });
  std::for_each(started.begin(), stay, f);
  started.erase(started.begin(), stay);
}

}  // namespace

void StartCopy(const void* from, void* to, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(to) % bytes != 0) {
    Fail("a copy that is not aligned");
  }
  std::memset(to, 0xaa, bytes);
  Async& async = AsyncOfThread();
  async.copies.push_back({from, to, bytes, async.copy_group});
}
void EndCopies() { ++AsyncOfThread().copy_group; }
void WaitForCopies(int left) {
  Async& async = AsyncOfThread();
  ForAllBut(left, async.copy_group, async.copies,
            [](const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); });
}

void SetWarpgroups(bool has) { has_warpgroups = has; }
bool HasWarpgroups() { return has_warpgroups; }
void ShowSharedToProducts() { AsyncOfThread().shown_in_round = RoundOfBlock(); }
void BeginProducts() { AsyncOfThread().products_begun = true; }

void StartProduct(const uint32_t* a, uint64_t b, int32_t* d, int columns) {
  Async& async = AsyncOfThread();
  if (!async.products_begun) Fail("a product that was not begun");
  if (!AllShown()) Fail("a product of shared memory that was not shown to it");
  if (b >> 62 != 0) Fail("a swizzled operand");
  Product product = {.a = a,
                     .b = SharedMemoryAt(FieldOf(b, 0)),
                     .to_next_chunk = FieldOf(b, 16),
                     .to_next_core = FieldOf(b, 32),
                     .d = d,
                     .columns = columns,
                     .group = async.product_group};
  std::copy(a, a + 4, product.first_a);
  if (LaneOfThread() == 0) product.first_b = HashOfB(product);
  async.products.push_back(product);
}

void EndProducts() {
  ++AsyncOfThread().product_group;
  AsyncOfThread().products_begun = false;
}

void WaitForProducts(int left) {
  Async& async = AsyncOfThread();
  ForAllBut(left, async.product_group, async.products, Finish);
}

}  // namespace ternion::emulator
