#include "base/buffer.h"

#include <algorithm>
#include <cstring>
#include <memory_resource>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::base {
namespace {

TEST(Buffer, IsZeroedAndAligned) {
  const size_t huge_page = size_t{2} << 20;
  for (const size_t bytes : {size_t{1}, size_t{63}, size_t{64}, size_t{100001}, huge_page - 1,
                             huge_page, huge_page + 1, 3 * huge_page}) {
    Buffer buffer(bytes);
    ASSERT_EQ(buffer.size(), bytes);
    const size_t alignment = bytes < huge_page ? 64 : huge_page;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % alignment, 0u) << bytes;
    EXPECT_TRUE(
        std::all_of(buffer.data(), buffer.data() + bytes, [](uint8_t b) { return b == 0; }));
  }
}

TEST(Buffer, IsZeroedWhenMemoryIsReused) {
  for (int round = 0; round < 3; ++round) {
    std::vector<Buffer> buffers;
    for (int i = 0; i < 50; ++i) {
      Buffer buffer(2000);
      EXPECT_EQ(std::count(buffer.data(), buffer.data() + 2000, 0), 2000);
      std::memset(buffer.data(), 0xff, 2000);
      buffers.push_back(std::move(buffer));
    }
  }
}

TEST(Buffer, EmptyHasNoMemory) {
  EXPECT_EQ(Buffer().data(), nullptr);
  EXPECT_EQ(Buffer(0).size(), 0u);
}

TEST(Buffer, MovesItsMemory) {
  for (const size_t bytes : {size_t{100}, size_t{5} << 20}) {
    Buffer first(bytes);
    first.data()[bytes - 1] = 42;
    const uint8_t* data = first.data();
    Buffer second = std::move(first);
    EXPECT_EQ(second.data(), data);
    EXPECT_EQ(second.data()[bytes - 1], 42);
    Buffer third(7);
    third = std::move(second);
    EXPECT_EQ(third.data(), data);
    EXPECT_EQ(third.size(), bytes);
  }
}

// Host memory that counts what it has lent out.
class CountingMemory : public Memory {
 public:
  uint8_t* Allocate(size_t bytes) override {
    lent_bytes += bytes;
    return HostMemory().Allocate(bytes);
  }
  void Free(uint8_t* data, size_t bytes) override {
    lent_bytes -= bytes;
    HostMemory().Free(data, bytes);
  }
  void Write(const void* from, size_t bytes, void* to) override { std::memcpy(to, from, bytes); }
  int64_t capacity_bytes() const override { return 0; }

  size_t lent_bytes = 0;
};

TEST(Buffer, LiesInItsMemoryAndMovesToAnother) {
  CountingMemory memory, other;
  {
    Array<int32_t> array(25, memory);
    EXPECT_EQ(memory.lent_bytes, 100u);
    array[24] = 7;
    const int32_t* data = array.data();
    array.MoveTo(memory);
    EXPECT_EQ(array.data(), data);
    array.MoveTo(other);
    EXPECT_EQ(array[24], 7);
    EXPECT_EQ(memory.lent_bytes, 0u);
    EXPECT_EQ(other.lent_bytes, 100u);
    Array<int32_t>().MoveTo(other);
    EXPECT_EQ(other.lent_bytes, 100u);
  }
  EXPECT_EQ(other.lent_bytes, 0u);
}

TEST(Buffer, MayHoldAnythingAtFirst) {
  CountingMemory memory;
  {
    Buffer buffer = Buffer::Unset(100, memory);
    EXPECT_EQ(buffer.size(), 100u);
    EXPECT_EQ(buffer.memory(), &memory);
    buffer.data()[99] = 1;
    EXPECT_EQ(memory.lent_bytes, 100u);
    EXPECT_EQ(Buffer::Unset(0, memory).data(), nullptr);
  }
  EXPECT_EQ(memory.lent_bytes, 0u);
}

TEST(Memory, TheHostSaysWhatItHasLent) {
  const int64_t before = HostMemory().allocated_bytes();
  {
    const Buffer small(100), large(3 << 20);
    EXPECT_EQ(HostMemory().allocated_bytes(), before + 100 + (3 << 20));
  }
  EXPECT_EQ(HostMemory().allocated_bytes(), before);
}

TEST(Memory, IsAResourceOfContainers) {
  CountingMemory memory;
  {
    std::pmr::vector<int64_t> values(&memory);
    values.assign(1000, 3);
    EXPECT_GE(memory.lent_bytes, 8000u);
  }
  EXPECT_EQ(memory.lent_bytes, 0u);
}

TEST(Array, CountsElements) {
  Array<int32_t> array(33);
  EXPECT_EQ(array.size(), 33u);
  array[32] = -5;
  EXPECT_EQ(array.span().back(), -5);
  EXPECT_EQ(array.data() + 32, &array[32]);
}

}  // namespace
}  // namespace ternion::base
