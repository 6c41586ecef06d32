// How the ternary product reads its weights: a type for each layout it takes (kernels/ternary.h).
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx.cuh"

namespace ternion::kernels {
namespace {

constexpr int kProductColumns = 32;

// kTiles: a block is one step of 64 columns.
struct TwoBitWeights {
  static constexpr int kColumns = kTileColumns;  // of a block
  static constexpr int kSteps = 1;               // of kTileColumns, in a block
  struct Block {
    uint2 words[kWarp];
  };

  // What a thread has of a block, and its A operands.
  using Words = uint2;
  __device__ static Words WordsOf(const Block& block, int lane) { return block.words[lane]; }
  __device__ static void Unpack(Words words, uint32_t (&a)[kColumns / kProductColumns][4]) {
    UnpackTile(words.x, a[0]);
    UnpackTile(words.y, a[1]);
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

  using Words = Base3Words;
  __device__ static Words WordsOf(const Block& block, int lane) {
    return WordsOfThread(block, lane);
  }
  __device__ static void Unpack(const Words& words, uint32_t (&a)[kColumns / kProductColumns][4]) {
    uint32_t operands[kOperandsOfBlock];
    words.Unpack(operands);
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
    uint32_t a[kColumns / kProductColumns][4];
    Unpack(WordsOf(block, lane), a);
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
