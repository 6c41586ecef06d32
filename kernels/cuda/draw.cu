// Weights that a seed decides, drawn where they stay. Each code is drawn by itself, though its byte
// of the HF packing has three more: those belong to rows far away, whose blocks would have to meet.
#include "base/checked.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"
#include "kernels/ternary_draw.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kWarpsOfBlock = 8;
constexpr int kThreads = kWarpsOfBlock * kWarp;

// A thread's two rows of a panel: g and g + 8 (kTiles).
struct RowsOfThread {
  DrawnRow row[2];
  int64_t columns[2];  // 0 where the row is past the matrix
};

__device__ RowsOfThread RowsOf(const DrawTernaryArgs& args, int64_t panel, int lane) {
  RowsOfThread rows;
  const int64_t packed_rows = base::CeilDiv(args.rows, 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = panel * kPanelRows + lane / 4 + 8 * i;
    const bool inside = row < args.rows;
    rows.row[i] = DrawnRow::Of(inside ? row : 0, packed_rows, args.columns, args.first_draw);
    rows.columns[i] = inside ? args.columns : 0;
  }
  return rows;
}

// Operands of a thread along its sixteen columns from `column` on: operand 4i + f is field f of
// word i of kTiles.
__device__ __forceinline__ void DrawOperands(uint64_t seed, const RowsOfThread& rows,
                                             int64_t column, uint32_t (&operands)[8]) {
#pragma unroll
  for (int o = 0; o < 8; ++o) {
    operands[o] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t c = column + o / 2 * 4 + j;
      if (c < rows.columns[o % 2]) operands[o] |= rows.row[o % 2].CodeAt(seed, c) << 8 * j;
    }
  }
}

// A warp for each block of the layout; grid.y counts panels.
template <bool kBase3>
__global__ void __launch_bounds__(kThreads) DrawTernaryKernel(DrawTernaryArgs args) {
  AwaitOpsBefore();
  constexpr int kColumns = kBase3 ? kBase3Columns : kTileColumns;
  const int64_t num_blocks = base::CeilDiv(args.columns, kColumns);
  const int64_t block = int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / kWarp;
  if (block >= num_blocks) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t column = block * kColumns + lane % 4 * 16;
  const int64_t place = blockIdx.y * num_blocks + block;
  const RowsOfThread rows = RowsOf(args, blockIdx.y, lane);
  if constexpr (kBase3) {
    uint32_t operands[kOperandsOfBlock];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t of_half[8];
      DrawOperands(args.seed, rows, column + half * kTileColumns, of_half);
#pragma unroll
      for (int o = 0; o < 8; ++o) operands[8 * half + o] = of_half[o];
    }
    const Base3Words words = Base3Words::Pack(operands);
    Base3Block& to = reinterpret_cast<Base3Block*>(args.codes)[place];
    *reinterpret_cast<uint2*>(to.left[lane]) = {words.word[0], words.word[1]};
    to.right[lane] = words.word[2];
    to.last[lane] = static_cast<uint8_t>(words.last);
  } else {
    uint32_t operands[8];
    DrawOperands(args.seed, rows, column, operands);
    const uint32_t first[] = {operands[0], operands[1], operands[2], operands[3]};
    const uint32_t second[] = {operands[4], operands[5], operands[6], operands[7]};
    reinterpret_cast<uint2*>(args.codes)[place * kWarp + lane] = {PackTile(first),
                                                                  PackTile(second)};
  }
}

}  // namespace

// ---- Launchers

namespace cuda {

void DrawTernary(const DrawTernaryArgs& args, Executor& executor) {
  const bool base3 = args.layout == TernaryLayout::kTilesBase3;
  const int64_t num_blocks = base::CeilDiv(args.columns, base3 ? kBase3Columns : kTileColumns);
  const dim3 grid(Blocks(base::CeilDiv(num_blocks, kWarpsOfBlock)),
                  Blocks(base::CeilDiv(args.rows, kPanelRows)));
  Launch(base3 ? DrawTernaryKernel<true> : DrawTernaryKernel<false>, grid, kThreads, executor,
         args);
}

}  // namespace cuda
}  // namespace ternion::kernels
