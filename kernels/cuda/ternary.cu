// The ternary product, over tiles (kernels/ternary.h): codes 0, 1, 2 are multiplied as they are,
// and the row's sum of activations is subtracted once. Here that of few rows, which is done when
// the weights were read; many rows go to ternary_tiles.cu.
#include <algorithm>

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
constexpr int kRing = 8;         // units of weights that a warp works on or waits for

// Of a block that multiplies up to kProducts * kProductRows rows at a time.
template <typename Weights, int kProducts>
struct PanelMemory {
  typename Weights::Unit ring[kMatmulWarps][kRing];
  int32_t sums[kMatmulWarps][kProducts * kProductRows][kPanelRows];  // what each warp adds
};

// Copies a warp's share of a panel, every kMatmulWarps-th unit, ahead of time: what is under way
// does not wait for registers, and memory is so far away that each multiprocessor should have some
// 30 KiB of it on their way.
template <typename Weights>
class PanelCopier {
 public:
  using Unit = typename Weights::Unit;

  __device__ PanelCopier(const TernaryMatrix& weights, int panel, Unit (*rings)[kRing])
      : ring_(rings[threadIdx.x / kWarp]),
        panel_bytes_(static_cast<int>(weights.stride_bytes())),
        panel_(weights.codes + int64_t{panel} * panel_bytes_) {}

  // Weights may be asked for before ops are done that come first: none writes any.
  __device__ void Begin() const {
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) Start(i);
  }
  // The warp's i-th unit, for each i in turn and all lanes together.
  __device__ __forceinline__ const Unit& Wait(int i) const {
    WaitForCopies<kRing - 2>();
    __syncwarp();  // so have the other lanes, and they are done with the unit before
    Start(i + kRing - 1);
    return ring_[i % kRing];
  }

 private:
  __device__ __forceinline__ void Start(int i) const {
    const int lane = threadIdx.x % kWarp, unit = threadIdx.x / kWarp + i * kMatmulWarps;
    const int at = lane * static_cast<int>(sizeof(uint4));
    const int from = unit * static_cast<int>(sizeof(Unit)) + at;
    if (at < static_cast<int>(sizeof(Unit)) && from < panel_bytes_) {
      StartCopy<sizeof(uint4)>(panel_ + from, reinterpret_cast<uint8_t*>(&ring_[i % kRing]) + at);
    }
    EndCopies();
  }

  Unit* const ring_;
  const int panel_bytes_;
  const uint8_t* const panel_;
};

// One panel times N * kProductRows rows from `first` on, some of which may lie behind the group's
// last. The block's warps share the columns.
template <int N, typename Weights, typename Memory>
__device__ inline void PanelTimesRows(const QuantizedRows& x, const RowMap& rows,
                                      const TernaryGroup& group, int64_t panel, int64_t first,
                                      const PanelCopier<Weights>& copier, Memory& memory) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, q = lane % 4;
  const int num_steps = static_cast<int>(base::CeilDiv(group.weights.columns, kTileColumns));
  const int num_units = (num_steps + 1) / kUnitSteps, num_whole = num_steps / kUnitSteps;
  const int8_t* codes[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = first + n * kProductRows + g, last = group.num_rows - 1;
    codes[n] = x.codes + rows(row < last ? row : last) * x.stride + 16 * q;
  }
  int32_t sums[N][4] = {};
  for (int i = 0, unit = warp; unit < num_units; ++i, unit += kMatmulWarps) {
    // Rows may end within a unit: what is read in place of the rest is multiplied by 0.
    const bool half = unit >= num_whole;
    const int column = unit * kUnitColumns, second = half ? 0 : kTileColumns;
    uint4 v[kUnitSteps][N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      v[0][n] = *reinterpret_cast<const uint4*>(codes[n] + column);
      v[1][n] = *reinterpret_cast<const uint4*>(codes[n] + column + second);
    }
    UnitOperands a;
    Weights::Unpack(copier.Wait(i), lane, half, a);
#pragma unroll
    for (int s = 0; s < kUnitSteps; ++s) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        MultiplyTile(a[2 * s], {v[s][n].x, v[s][n].y}, sums[n]);
        MultiplyTile(a[2 * s + 1], {v[s][n].z, v[s][n].w}, sums[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      memory.sums[warp][n * kProductRows + 2 * q + i % 2][g + i / 2 * 8] = sums[n][i];
    }
  }
  __syncthreads();
  ForEach(N * kProductRows * kPanelRows, [&](int64_t i) {
    const int64_t r = i / kPanelRows, panel_row = i % kPanelRows;
    const int64_t row = first + r, output = panel * kPanelRows + panel_row;
    if (row >= group.num_rows || output >= group.weights.rows) return;
    const int64_t x_row = rows(row);
    int32_t sum = -x.sums[x_row];
    for (int w = 0; w < kMatmulWarps; ++w) sum += memory.sums[w][r][panel_row];
    group.y[row * group.y_stride + output] =
        static_cast<float>(sum) * (group.weights.scale * x.scales[x_row]);
  });
  __syncthreads();
}

// A block's panel times all rows of the group; the copier has begun.
template <int kProducts, typename Weights, typename Memory>
__device__ inline void PanelTimesGroup(const QuantizedRows& x, const RowMap& rows,
                                       const TernaryGroup& group, int64_t panel,
                                       const PanelCopier<Weights>& copier, Memory& memory) {
  for (int64_t row = 0; row < group.num_rows; row += kProducts * kProductRows) {
    const int64_t left = group.num_rows - row;
    if (row > 0) copier.Begin();
    if (kProducts == 1 || left <= kProductRows) {
      PanelTimesRows<1>(x, rows, group, panel, row, copier, memory);
    } else if (left <= 2 * kProductRows) {
      PanelTimesRows<2>(x, rows, group, panel, row, copier, memory);
    } else {
      PanelTimesRows<kMaxProducts>(x, rows, group, panel, row, copier, memory);
    }
  }
}

// With one product at a time there are registers for twice as many blocks.
constexpr int BlocksOfMultiprocessor(int products) { return products == 1 ? 4 : 2; }

// A block per panel of each group.
template <typename Weights, int kProducts>
__global__ void __launch_bounds__(kMatmulThreads, BlocksOfMultiprocessor(kProducts))
    TernaryMatmulKernel(QuantizedRows x, TernaryGroups groups) {
  __shared__ PanelMemory<Weights, kProducts> memory;
  const TernaryGroups::Panel at = groups.PanelAt(static_cast<int>(blockIdx.x));
  const TernaryGroup& group = groups.group[at.group];
  const PanelCopier<Weights> copier(group.weights, at.panel, memory.ring);
  copier.Begin();
  AwaitOpsBefore();
  PanelTimesGroup<kProducts>(x, RowMap{group.row_begin}, group, at.panel, copier, memory);
}

// A block per panel, expert that has rows, and matrix.
template <typename Weights, int kProducts>
__global__ void __launch_bounds__(kMatmulThreads, BlocksOfMultiprocessor(kProducts))
    ExpertMatmulKernel(ExpertMatmulArgs args) {
  __shared__ PanelMemory<Weights, kProducts> memory;
  AwaitOpsBefore();
  const int32_t expert = args.used[blockIdx.y];
  if (expert < 0) return;
  const ExpertMatrices& of = args.matrices[blockIdx.z];
  const int64_t begin = args.begin[expert];
  const TernaryGroup group = {.weights = of.weights[expert],
                              .num_rows = args.begin[expert + 1] - begin,
                              .y = of.y + begin * args.rows,
                              .y_stride = args.rows};
  const PanelCopier<Weights> copier(group.weights, static_cast<int>(blockIdx.x), memory.ring);
  copier.Begin();
  const RowMap rows = {begin, args.order, args.k};
  PanelTimesGroup<kProducts>(args.x, rows, group, blockIdx.x, copier, memory);
}

}  // namespace

// ---- Launchers

namespace cuda {

// From so many rows on, tiles: of a group, whose panels here are read twice then, while its tiles
// may be too few for the GPU, and of an expert on average, of which there are many.
constexpr int64_t kManyRows = 64;
constexpr int64_t kManyRowsOfExpert = 32;
// Up to so many on average, few experts have more than one product's.
constexpr int64_t kFewRowsOfExpert = 4;

void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  const auto many = [](const TernaryGroup& group) { return group.num_rows >= kManyRows; };
  const auto few = [](const TernaryGroup& group) { return group.num_rows < kManyRows; };
  ForGroups(args.groups, few, [&](const TernaryGroups& groups) {
    WithWeights(groups.group[0].weights.layout, [&](auto weights) {
      using Weights = decltype(weights);
      const auto kernel = groups.max_rows <= kProductRows
                              ? TernaryMatmulKernel<Weights, 1>
                              : TernaryMatmulKernel<Weights, kMaxProducts>;
      Launch(kernel, Blocks(groups.num_panels()), kMatmulThreads, executor, args.x, groups);
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
  if (args.num_routes == 0) return;
  if (args.num_routes < kManyRowsOfExpert * args.num_experts) {
    const int64_t most_used = std::min<int64_t>(args.num_routes, args.num_experts);
    const dim3 grid(Blocks(panels), Blocks(most_used), Blocks(args.num_matrices));
    return WithWeights(args.layout, [&](auto weights) {
      using Weights = decltype(weights);
      const auto kernel = args.num_routes <= kFewRowsOfExpert * args.num_experts
                              ? ExpertMatmulKernel<Weights, 1>
                              : ExpertMatmulKernel<Weights, kMaxProducts>;
      Launch(kernel, grid, kMatmulThreads, executor, args);
    });
  }
  const int64_t tiles = base::CeilDiv(panels, kTilePanels) * args.num_matrices *
                        NumTileSlots(args.num_routes, args.num_experts, kMaxTileRows);
  ExpertTiles(args, TileRowsFor(tiles), executor);
}

}  // namespace cuda
}  // namespace ternion::kernels
