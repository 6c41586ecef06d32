// The ternary product, over panels (kernels/ternary.h): codes 0, 1, 2 are multiplied as they are,
// and the row's sum of activations is subtracted once.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kMatmulThreads = 256;
constexpr int kMatmulWarps = kMatmulThreads / kWarp;
constexpr int kTileRows = 4;  // rows of x that pass over weights in registers

// As many groups as fit into the parameters of one launch.
constexpr int kMaxGroups = 32;
struct Groups {
  TernaryGroup group[kMaxGroups];
};

// 64 bytes of a panel are one block: word r holds 16 codes of row r, four in each 2-bit field. Half
// a warp reads a block, so that a thread stays with one row of the panel.
template <int R>
__device__ inline void PanelTile(const QuantizedRows& x, const TernaryGroup& group, int64_t panel,
                                 int64_t first, int32_t (*of_warps)[kTileRows][kPanelRows]) {
  const int half_warp = threadIdx.x / kPanelRows;
  const int panel_row = threadIdx.x % kPanelRows;
  const int64_t num_blocks = group.weights.num_blocks();
  const uint32_t* words =
      reinterpret_cast<const uint32_t*>(group.weights.codes + panel * num_blocks * kBlockBytes);
  const int8_t* codes = x.codes + (group.row_begin + first) * x.stride;
  int32_t sums[R] = {};
  for (int64_t b = half_warp; b < num_blocks; b += kMatmulThreads / kPanelRows) {
    const uint32_t word = words[b * kPanelRows + panel_row];
    int w[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) w[f] = static_cast<int>(word >> 2 * f & 0x03030303);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int4 v = *reinterpret_cast<const int4*>(codes + r * x.stride + b * kBlockColumns);
      sums[r] = __dp4a(w[0], v.x, sums[r]);
      sums[r] = __dp4a(w[1], v.y, sums[r]);
      sums[r] = __dp4a(w[2], v.z, sums[r]);
      sums[r] = __dp4a(w[3], v.w, sums[r]);
    }
  }
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sums[r] += __shfl_xor_sync(kFullWarp, sums[r], kPanelRows);
    if (threadIdx.x % kWarp < kPanelRows) of_warps[warp][r][panel_row] = sums[r];
  }
  __syncthreads();
  if (threadIdx.x < R * kPanelRows) {
    const int64_t r = threadIdx.x / kPanelRows;
    const int64_t output = panel * kPanelRows + panel_row;
    int32_t sum = -x.sums[group.row_begin + first + r];
    for (int i = 0; i < kMatmulWarps; ++i) sum += of_warps[i][r][panel_row];
    if (output < group.weights.rows) {
      group.y[(first + r) * group.y_stride + output] =
          static_cast<float>(sum) * (group.weights.scale * x.scales[group.row_begin + first + r]);
    }
  }
  __syncthreads();
}

// A block per panel and group.
__global__ void __launch_bounds__(kMatmulThreads)
    TernaryMatmulKernel(QuantizedRows x, Groups groups) {
  __shared__ int32_t of_warps[kMatmulWarps][kTileRows][kPanelRows];
  const TernaryGroup& group = groups.group[blockIdx.y];
  const int64_t panel = blockIdx.x;
  if (panel >= group.weights.num_panels()) return;
  int64_t row = 0;
  for (; row + kTileRows <= group.num_rows; row += kTileRows) {
    PanelTile<kTileRows>(x, group, panel, row, of_warps);
  }
  for (; row < group.num_rows; ++row) PanelTile<1>(x, group, panel, row, of_warps);
}

}  // namespace

// ---- Launchers

namespace cuda {

void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  for (std::span<const TernaryGroup> left = args.groups; !left.empty();) {
    Groups groups = {};
    int count = 0;
    int64_t panels = 0;
    for (; !left.empty() && count < kMaxGroups; left = left.subspan(1)) {
      const TernaryGroup& group = left.front();
      if (group.num_rows == 0) continue;
      groups.group[count++] = group;
      panels = group.weights.num_panels() > panels ? group.weights.num_panels() : panels;
    }
    Launch(TernaryMatmulKernel, dim3(Blocks(panels), Blocks(count)), kMatmulThreads, executor,
           args.x, groups);
  }
}

}  // namespace cuda
}  // namespace ternion::kernels
