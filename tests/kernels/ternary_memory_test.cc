// What the ternary product reads of memory, on the emulated device.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "tests/kernels/float_ops_support.h"
#include "tests/kernels/ternary_support.h"

namespace ternion::kernels {
namespace {

// The last row may end where memory does, also within a block of the weights.
class RowsThatEndMemory : public testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Rows, RowsThatEndMemory, testing::Values(1, 20, 70));

TEST_P(RowsThatEndMemory, AreAllThatIsRead) {
  Executor executor;
  const Kernels* const cuda = CudaVariant(executor);
  ASSERT_NE(cuda, nullptr);
  std::mt19937 random(6);
  const int64_t num_rows = GetParam(), dim = 192, page = sysconf(_SC_PAGESIZE);
  const Weights weights(20, dim, 1, cuda->smaller_layout, random);
  QuantizedBuffer buffer = RandomRows(num_rows, dim, random);
  QuantizedRows x = buffer.rows(num_rows);
  const int64_t bytes = num_rows * x.stride, pages = base::RoundUp(bytes, page);
  void* const memory =
      mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(static_cast<uint8_t*>(memory) + pages, page, PROT_NONE), 0);
  x.codes = static_cast<int8_t*>(memory) + pages - bytes;
  std::copy_n(buffer.rows(num_rows).codes, bytes, x.codes);
  std::vector<float> y(num_rows * 20);
  const TernaryGroup group[] = {{weights.tiles.view, 0, num_rows, y.data(), 20, nullptr}};
  cuda->ternary_matmul({x, group}, executor);
  EXPECT_EQ(cuda->wait(executor), nullptr);
  munmap(memory, pages + page);
}

}  // namespace
}  // namespace ternion::kernels
