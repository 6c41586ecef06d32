// The ternary product, over tiles (kernels/ternary.h): codes 0, 1, 2 are multiplied as they are,
// and the row's sum of activations is subtracted once. Here that of few rows, which is done when
// the weights were read; many rows go to ternary_tiles.cu.
#include "kernels/cuda/ternary_schedule.h"
#include "kernels/cuda/ternary_weights.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kMatmulThreads = 256;
constexpr int kMatmulWarps = kMatmulThreads / kWarp;
constexpr int kProductRows = 8;  // rows of x in one product of a warp
constexpr int kMaxProducts = 4;  // that share their weights

// What each warp adds to the sums of a panel.
using SumsOfWarps = int32_t[kMatmulWarps][kMaxProducts * kProductRows][kPanelRows];

// One panel times N * kProductRows rows of x from `first` on, some of which may lie behind the
// group's last. The block's warps share the columns.
template <typename Weights, int N>
__device__ inline void PanelTimesRows(const QuantizedRows& x, const TernaryGroup& group,
                                      int64_t panel, int64_t first, SumsOfWarps& of_warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, q = lane % 4;
  const int64_t num_blocks = base::CeilDiv(group.weights.columns, Weights::kColumns);
  const int64_t last_step = (group.weights.columns - 1) / kTileColumns;
  const auto* const blocks =
      reinterpret_cast<const typename Weights::Block*>(group.weights.codes) + panel * num_blocks;
  const int8_t* codes[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = first + n * kProductRows + g;
    const int64_t last = group.num_rows - 1;
    codes[n] = x.codes + (group.row_begin + (row < last ? row : last)) * x.stride + 16 * q;
  }
  int32_t sums[N][4] = {};
#pragma unroll(4 / Weights::kSteps)
  for (int64_t b = warp; b < num_blocks; b += kMatmulWarps) {
    uint32_t a[Weights::kColumns / kProductColumns][4];
    Weights::Unpack(Weights::WordsOf(blocks[b], lane), a);
#pragma unroll
    for (int s = 0; s < Weights::kSteps; ++s) {
      // Rows may end within a block: codes behind are 0, whatever they are multiplied with.
      const int64_t step = b * Weights::kSteps + s;
      const int64_t column = (s == 0 || step < last_step ? step : last_step) * kTileColumns;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint4 v = *reinterpret_cast<const uint4*>(codes[n] + column);
        MultiplyTile(a[2 * s], {v.x, v.y}, sums[n]);
        MultiplyTile(a[2 * s + 1], {v.z, v.w}, sums[n]);
      }
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

// Brings the panel closer while ops that make x still run: no op writes weights.
template <typename Weights>
__device__ inline void FetchPanel(const TernaryMatrix& weights, int64_t panel) {
  constexpr int64_t kLine = 128;
  const int64_t bytes =
      base::CeilDiv(weights.columns, Weights::kColumns) * sizeof(typename Weights::Block);
  const uint8_t* const codes = weights.codes + panel * bytes;
  ForEach(base::CeilDiv(bytes, kLine), [&](int64_t i) { PrefetchLine(codes + i * kLine); });
}

// A block's panel times all rows of the group.
template <typename Weights>
__device__ inline void PanelTimesGroup(const QuantizedRows& x, const TernaryGroup& group,
                                       int64_t panel) {
  __shared__ SumsOfWarps of_warps;
  for (int64_t row = 0; row < group.num_rows; row += kMaxProducts * kProductRows) {
    const int64_t left = group.num_rows - row;
    if (left <= kProductRows) {
      PanelTimesRows<Weights, 1>(x, group, panel, row, of_warps);
    } else if (left <= 2 * kProductRows) {
      PanelTimesRows<Weights, 2>(x, group, panel, row, of_warps);
    } else {
      PanelTimesRows<Weights, kMaxProducts>(x, group, panel, row, of_warps);
    }
  }
}

// A block per panel and group.
template <typename Weights>
__global__ void __launch_bounds__(kMatmulThreads, 2)
    TernaryMatmulKernel(QuantizedRows x, TernaryGroups groups) {
  const TernaryGroup& group = groups.group[blockIdx.y];
  const bool has_panel = blockIdx.x < group.weights.num_panels();
  if (has_panel) FetchPanel<Weights>(group.weights, blockIdx.x);
  AwaitOpsBefore();
  if (has_panel) PanelTimesGroup<Weights>(x, group, blockIdx.x);
}

// A block per panel, expert and matrix.
template <typename Weights>
__global__ void __launch_bounds__(kMatmulThreads, 2) ExpertMatmulKernel(ExpertMatmulArgs args) {
  AwaitOpsBefore();
  const int32_t begin = args.begin[blockIdx.y], end = args.begin[blockIdx.y + 1];
  if (begin == end) return;
  const ExpertMatrices& of = args.matrices[blockIdx.z];
  const TernaryGroup group = {.weights = of.weights[blockIdx.y],
                              .row_begin = begin,
                              .num_rows = end - begin,
                              .y = of.y + begin * args.rows,
                              .y_stride = args.rows};
  PanelTimesGroup<Weights>(args.x, group, blockIdx.x);
}

}  // namespace

// ---- Launchers

namespace cuda {

// From so many rows on, tiles: of a group, whose panels here are read twice then, while its tiles
// may be too few for the GPU, and of an expert on average, of which there are many.
constexpr int64_t kManyRows = 64;
constexpr int64_t kManyRowsOfExpert = 32;

void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  const auto many = [](const TernaryGroup& group) { return group.num_rows >= kManyRows; };
  const auto few = [](const TernaryGroup& group) { return group.num_rows < kManyRows; };
  ForGroups(args.groups, few, [&](const TernaryGroups& groups) {
    const dim3 grid(Blocks(groups.max_panels), Blocks(groups.count));
    WithWeights(groups.group[0].weights.layout, [&](auto weights) {
      Launch(TernaryMatmulKernel<decltype(weights)>, grid, kMatmulThreads, executor, args.x,
             groups);
    });
  });
  ForGroups(args.groups, many, [&](const TernaryGroups& groups) {
    const int64_t tiles = base::CeilDiv(groups.max_panels, kTilePanels) *
                          base::CeilDiv(groups.max_rows, kMaxTileRows) * groups.count;
    TernaryTiles(args.x, groups, TileRowsFor(tiles), executor);
  });
}

void ExpertMatmul(const ExpertMatmulArgs& args, Executor& executor) {
  const int64_t panels = base::CeilDiv(args.rows, kPanelRows);
  if (args.x.num_rows == 0) return;
  if (args.x.num_rows < kManyRowsOfExpert * args.num_experts) {
    const dim3 grid(Blocks(panels), Blocks(args.num_experts), Blocks(args.num_matrices));
    return WithWeights(args.layout, [&](auto weights) {
      Launch(ExpertMatmulKernel<decltype(weights)>, grid, kMatmulThreads, executor, args);
    });
  }
  const int64_t tiles = base::CeilDiv(panels, kTilePanels) * args.num_matrices *
                        NumTileSlots(args.x.num_rows, args.num_experts, kMaxTileRows);
  ExpertTiles(args, TileRowsFor(tiles), executor);
}

}  // namespace cuda
}  // namespace ternion::kernels
