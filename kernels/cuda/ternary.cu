// The ternary product, over tiles (kernels/ternary.h): codes 0, 1, 2 are multiplied as they are,
// and the row's sum of activations is subtracted once.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kMatmulThreads = 256;
constexpr int kMatmulWarps = kMatmulThreads / kWarp;
constexpr int kProductRows = 8;  // rows of x in one product of a warp
constexpr int kMaxProducts = 4;  // that share their weights

// As many groups as fit into the parameters of one launch.
constexpr int kMaxGroups = 32;
struct Groups {
  TernaryGroup group[kMaxGroups];
};

// Field f of each byte is operand f of the product: see kTiles.
__device__ inline void UnpackTile(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int f = 0; f < 4; ++f) a[f] = word >> 2 * f & 0x03030303;
}

// One panel times N * kProductRows rows of x from `first` on, some of which may lie behind the
// group's last. The block's warps share the columns.
template <int N>
__device__ inline void PanelTimesRows(
    const QuantizedRows& x, const TernaryGroup& group, int64_t panel, int64_t first,
    int32_t (*of_warps)[kMaxProducts * kProductRows][kPanelRows]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, q = lane % 4;
  const int64_t num_blocks = base::CeilDiv(group.weights.columns, kTileColumns);
  const uint2* tiles = reinterpret_cast<const uint2*>(group.weights.codes) +
                       panel * num_blocks * (kTileBytes / sizeof(uint2)) + lane;
  const int8_t* codes[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = first + n * kProductRows + g;
    const int64_t last = group.num_rows - 1;
    codes[n] = x.codes + (group.row_begin + (row < last ? row : last)) * x.stride + 16 * q;
  }
  int32_t sums[N][4] = {};
#pragma unroll 4
  for (int64_t b = warp; b < num_blocks; b += kMatmulWarps) {
    const uint2 words = tiles[b * (kTileBytes / sizeof(uint2))];
    uint32_t left[4], right[4];
    UnpackTile(words.x, left);
    UnpackTile(words.y, right);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint4 v = *reinterpret_cast<const uint4*>(codes[n] + b * kTileColumns);
      MultiplyTile(left, {v.x, v.y}, sums[n]);
      MultiplyTile(right, {v.z, v.w}, sums[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      of_warps[warp][n * kProductRows + 2 * q + i % 2][g + i / 2 * 8] = sums[n][i];
    }
  }
  __syncthreads();
  ForEach(N * kProductRows * kPanelRows, [&](int64_t i) {
    const int64_t r = i / kPanelRows, panel_row = i % kPanelRows;
    const int64_t row = first + r, output = panel * kPanelRows + panel_row;
    if (row >= group.num_rows || output >= group.weights.rows) return;
    const int64_t x_row = group.row_begin + row;
    int32_t sum = -x.sums[x_row];
    for (int w = 0; w < kMatmulWarps; ++w) sum += of_warps[w][r][panel_row];
    group.y[row * group.y_stride + output] =
        static_cast<float>(sum) * (group.weights.scale * x.scales[x_row]);
  });
  __syncthreads();
}

// A block's panel times all rows of the group.
__device__ inline void PanelTimesGroup(const QuantizedRows& x, const TernaryGroup& group,
                                       int64_t panel) {
  __shared__ int32_t of_warps[kMatmulWarps][kMaxProducts * kProductRows][kPanelRows];
  for (int64_t row = 0; row < group.num_rows; row += kMaxProducts * kProductRows) {
    const int64_t left = group.num_rows - row;
    if (left <= kProductRows) {
      PanelTimesRows<1>(x, group, panel, row, of_warps);
    } else if (left <= 2 * kProductRows) {
      PanelTimesRows<2>(x, group, panel, row, of_warps);
    } else {
      PanelTimesRows<kMaxProducts>(x, group, panel, row, of_warps);
    }
  }
}

// A block per panel and group.
__global__ void __launch_bounds__(kMatmulThreads, 2)
    TernaryMatmulKernel(QuantizedRows x, Groups groups) {
  const TernaryGroup& group = groups.group[blockIdx.y];
  if (blockIdx.x < group.weights.num_panels()) PanelTimesGroup(x, group, blockIdx.x);
}

// A block per panel and expert.
__global__ void __launch_bounds__(kMatmulThreads, 2) ExpertMatmulKernel(ExpertMatmulArgs args) {
  const int32_t begin = args.begin[blockIdx.y], end = args.begin[blockIdx.y + 1];
  if (begin == end) return;
  const TernaryGroup group = {.weights = args.weights[blockIdx.y],
                              .row_begin = begin,
                              .num_rows = end - begin,
                              .y = args.y + begin * args.rows,
                              .y_stride = args.rows};
  PanelTimesGroup(args.x, group, blockIdx.x);
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

void ExpertMatmul(const ExpertMatmulArgs& args, Executor& executor) {
  const unsigned panels = Blocks(base::CeilDiv(args.rows, kPanelRows));
  const unsigned experts = args.x.num_rows == 0 ? 0 : Blocks(args.num_experts);
  Launch(ExpertMatmulKernel, dim3(panels, experts), kMatmulThreads, executor, args);
}

}  // namespace cuda
}  // namespace ternion::kernels
