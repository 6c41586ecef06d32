// Pieces of a device's memory, on the emulated one.
#include <algorithm>
#include <new>
#include <random>

#include "gtest/gtest.h"
#include "kernels/cuda/memory.h"
#include "tests/emulator/emulator.h"

namespace ternion::kernels {
namespace {

struct Piece {
  uint8_t* data;
  size_t bytes;
  uint8_t mark;
};

// The first of all: slabs are never given back.
TEST(DeviceMemory, SaysWhatItHasTaken) {
  DeviceMemory memory(0, size_t{1} << 30);
  EXPECT_EQ(memory.allocated_bytes(), 0);
  const int64_t free_before = *memory.free_bytes();
  constexpr size_t kLarge = size_t{9} << 20;
  uint8_t* const large = memory.Allocate(kLarge);
  EXPECT_EQ(memory.allocated_bytes(), int64_t{kLarge});
  EXPECT_EQ(*memory.free_bytes(), free_before - int64_t{kLarge});
  memory.Free(large, kLarge);
  EXPECT_EQ(memory.allocated_bytes(), 0);
  EXPECT_EQ(*memory.free_bytes(), free_before);
  uint8_t* const small = memory.Allocate(100);  // a slab, which stays
  EXPECT_GE(memory.allocated_bytes(), 100);
  const int64_t slab = memory.allocated_bytes();
  memory.Free(small, 100);
  EXPECT_EQ(memory.allocated_bytes(), slab);
}

TEST(DeviceMemory, PiecesAreZeroedAlignedAndApart) {
  emulator::SetStrict(false);  // the host may look
  DeviceMemory memory(0, size_t{1} << 30);
  std::mt19937 rng(1);
  std::vector<Piece> pieces;
  const auto has = [](const Piece& piece, uint8_t value) {
    return std::all_of(piece.data, piece.data + piece.bytes, [=](uint8_t b) { return b == value; });
  };
  for (int i = 0; i < 3000; ++i) {
    if (!pieces.empty() && rng() % 5 < 2) {
      std::swap(pieces[rng() % pieces.size()], pieces.back());
      const Piece& piece = pieces.back();
      ASSERT_TRUE(has(piece, piece.mark));
      memory.Free(piece.data, piece.bytes);
      pieces.pop_back();
      continue;
    }
    const size_t bytes = rng() % 100 == 0 ? size_t{9} << 20 : 1 + rng() % 4 * 333 * (1 + rng() % 9);
    const bool unset = rng() % 2 == 0;
    const Piece piece = {unset ? memory.AllocateUnset(bytes) : memory.Allocate(bytes), bytes,
                         static_cast<uint8_t>(1 + rng() % 255)};
    ASSERT_EQ(reinterpret_cast<uintptr_t>(piece.data) % 256, 0u);
    ASSERT_TRUE(unset || has(piece, 0));
    std::fill_n(piece.data, bytes, piece.mark);
    pieces.push_back(piece);
  }
  for (const Piece& piece : pieces) {
    EXPECT_TRUE(has(piece, piece.mark));
    memory.Free(piece.data, piece.bytes);
  }
}

TEST(DeviceMemory, RunningOutIsAnException) {
  emulator::SetStrict(false);
  DeviceMemory memory(0, size_t{1} << 30);
  EXPECT_THROW(memory.Allocate(size_t{1} << 40), std::bad_alloc);
  uint8_t* const data = memory.Allocate(100);  // goes on
  memory.Free(data, 100);
}

}  // namespace
}  // namespace ternion::kernels
