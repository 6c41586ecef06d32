// How the ternary product reads its weights: a type for each layout it takes (kernels/ternary.h).
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx.cuh"

namespace ternion::kernels {
namespace {

constexpr int kProductColumns = 32;

// What the product of few rows takes at once: a unit, two steps of kTileColumns, of which a matrix
// may lack the last one.
constexpr int kUnitSteps = 2;
constexpr int kUnitColumns = kUnitSteps * kTileColumns;
using UnitOperands = uint32_t[kUnitColumns / kProductColumns][4];

// kTiles: a block is one step of 64 columns.
struct TwoBitWeights {
  static constexpr int kColumns = kTileColumns;  // of a block
  static constexpr int kSteps = 1;               // of kTileColumns, in a block
  struct Block {
    uint2 words[kWarp];
  };

  // A lane's operands.
  struct alignas(16) Unit {
    Block block[kUnitSteps];
  };
  __device__ static void Unpack(const Unit& unit, int lane, UnitOperands& a) {
    const uint2 first = unit.block[0].words[lane], second = unit.block[1].words[lane];
    UnpackTile(first.x, a[0]);
    UnpackTile(first.y, a[1]);
    UnpackTile(second.x, a[2]);
    UnpackTile(second.y, a[3]);
  }

  // A warp's copy of step `step` of a panel, from where its lane has its first piece.
  __device__ static const uint8_t* PieceOf(const uint8_t* panel, int lane) {
    return panel + lane * sizeof(uint2);
  }
  __device__ static void StartCopyOf(int step, const uint8_t* piece, int lane, Block& to) {
    StartCopy<sizeof(uint2)>(piece + step * sizeof(Block), &to.words[lane]);
  }
  // For a step behind the last.
  __device__ static void ClearOf(int lane, Block& block) { block.words[lane] = {}; }
  // What a thread has of a block's step, as kTiles has it.
  __device__ static uint2 TilesOf(int, const Block& block, int lane) { return block.words[lane]; }
};

// kTilesBase3: a block is two steps.
struct Base3Weights {
  static constexpr int kColumns = kBase3Columns;
  static constexpr int kSteps = 2;
  using Block = Base3Block;

  using Unit = Block;
  __device__ static void Unpack(const Unit& unit, int lane, UnitOperands& a) {
    uint32_t operands[kOperandsOfBlock];
    WordsOfThread(unit, lane).Unpack(operands);
#pragma unroll
    for (int i = 0; i < kOperandsOfBlock; ++i) a[i / 4][i % 4] = operands[i];
  }

  // All of the block comes with its first step.
  __device__ static const uint8_t* PieceOf(const uint8_t* panel, int lane) {
    return panel + lane * sizeof(uint4);
  }
  __device__ static void StartCopyOf(int step, const uint8_t* piece, int lane, Block& to) {
    if (step % kSteps != 0 || lane >= static_cast<int>(sizeof(Block) / sizeof(uint4))) return;
    StartCopy<sizeof(uint4)>(piece + step / kSteps * sizeof(Block),
                             reinterpret_cast<uint4*>(&to) + lane);
  }
  __device__ static void ClearOf(int, Block&) {}  // its block ends with codes 0
  __device__ static uint2 TilesOf(int step, const Block& block, int lane) {
    __syncwarp();  // other lanes waited for their copies, too
    UnitOperands a;
    Unpack(block, lane, a);
    return {PackTile(a[2 * step]), PackTile(a[2 * step + 1])};
  }
};

// f(weights) of the type for `layout`.
template <typename F>
void WithWeights(TernaryLayout layout, F f) {
  layout == TernaryLayout::kTilesBase3 ? f(Base3Weights()) : f(TwoBitWeights());
}

}  // namespace
}  // namespace ternion::kernels
