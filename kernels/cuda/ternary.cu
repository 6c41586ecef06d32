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
constexpr int kRing = 4;         // units of weights that a warp works on or waits for

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

  // Asks for the first units. May be called before ops are done that come first: none writes
  // weights.
  __device__ PanelCopier(const TernaryMatrix& weights, int panel, Unit (*rings)[kRing])
      : ring_(reinterpret_cast<uint8_t*>(rings[threadIdx.x / kWarp])) {
    const int at = threadIdx.x % kWarp * static_cast<int>(sizeof(uint4));
    const int first = threadIdx.x / kWarp * static_cast<int>(sizeof(Unit)) + at;
    const int panel_bytes = static_cast<int>(weights.stride_bytes());
    ring_ += at;
    from_ = weights.codes + int64_t{panel} * panel_bytes + first;
    left_ = at < static_cast<int>(sizeof(Unit)) ? panel_bytes - first : 0;
#pragma unroll
    for (int slot = 0; slot < kRing - 1; ++slot) Start(slot);
  }

  // Until the warp's next unit is in `slot`, which all lanes name in turn, from 0 on.
  __device__ __forceinline__ void Wait(int slot) {
    WaitForCopies<kRing - 2>();
    __syncwarp();  // so have the other lanes, and they are done with the unit before
    Start((slot + kRing - 1) % kRing);
  }

 private:
  // A lane's piece of the next unit.
  __device__ __forceinline__ void Start(int slot) {
    constexpr int kStride = kMatmulWarps * static_cast<int>(sizeof(Unit));
    if (left_ > 0) StartCopy<sizeof(uint4)>(from_, ring_ + slot * sizeof(Unit));
    EndCopies();
    from_ += kStride;
    left_ -= kStride;
  }

  uint8_t* ring_;
  const uint8_t* from_;
  int left_;  // bytes, from there to the panel's end
};

// A warp's units of one panel times N * kProductRows rows of x.
template <typename Weights, int N>
class WarpProduct {
 public:
  using Unit = typename Weights::Unit;

  // Some rows may lie behind the group's last: in their place there is that one.
  __device__ WarpProduct(const QuantizedRows& x, const RowMap& rows, const TernaryGroup& group,
                         int64_t first, const Unit (*rings)[kRing])
      : ring_(rings[threadIdx.x / kWarp]),
        num_steps_(static_cast<int>(base::CeilDiv(group.weights.columns, kTileColumns))) {
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t row = first + n * kProductRows + g, last = group.num_rows - 1;
      codes_[n] = x.codes + rows(row < last ? row : last) * x.stride + 16 * q + warp * kUnitColumns;
    }
  }

  __device__ __forceinline__ void Run(PanelCopier<Weights>& copier, int32_t (&sums)[N][4]) {
    int unit = threadIdx.x / kWarp;
    const int slot = RunWholeUnits(copier, unit, sums);
    if (unit * kUnitSteps < num_steps_) Multiply<1>(copier, slot, sums);
  }

 private:
  // Returns the slot of the unit behind.
  __device__ __forceinline__ int RunWholeUnits(PanelCopier<Weights>& copier, int& unit,
                                               int32_t (&sums)[N][4]) {
    const int num_whole = num_steps_ / kUnitSteps;
    for (;;) {
#pragma unroll
      for (int slot = 0; slot < kRing; ++slot, unit += kMatmulWarps) {
        if (unit >= num_whole) return slot;
        Multiply<kUnitSteps>(copier, slot, sums);
      }
    }
  }

  // The next unit, or its first step alone.
  template <int kSteps>
  __device__ __forceinline__ void Multiply(PanelCopier<Weights>& copier, int slot,
                                           int32_t (&sums)[N][4]) {
    uint4 v[kSteps][N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        v[s][n] = *reinterpret_cast<const uint4*>(codes_[n] + s * kTileColumns);
      }
      codes_[n] += kMatmulWarps * kUnitColumns;
    }
    copier.Wait(slot);
    UnitOperands a;
    Weights::Unpack(ring_[slot], threadIdx.x % kWarp, a);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        MultiplyTile(a[2 * s], {v[s][n].x, v[s][n].y}, sums[n]);
        MultiplyTile(a[2 * s + 1], {v[s][n].z, v[s][n].w}, sums[n]);
      }
    }
  }

  const Unit* const ring_;
  const int num_steps_;
  const int8_t* codes_[N];
};

// One panel times N * kProductRows rows from `first` on. The block's warps share the columns.
template <int N, typename Weights, typename Memory>
__device__ inline void PanelTimesRows(const QuantizedRows& x, const RowMap& rows,
                                      const TernaryGroup& group, int64_t panel, int64_t first,
                                      PanelCopier<Weights>& copier, Memory& memory) {
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
  int32_t sums[N][4] = {};
  WarpProduct<Weights, N>(x, rows, group, first, memory.ring).Run(copier, sums);
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

// A block's panel times all rows of the group, for which the copier has set out.
template <int kProducts, typename Weights, typename Memory>
__device__ inline void PanelTimesGroup(const QuantizedRows& x, const RowMap& rows,
                                       const TernaryGroup& group, int panel,
                                       PanelCopier<Weights>& copier, Memory& memory) {
  for (int64_t row = 0; row < group.num_rows; row += kProducts * kProductRows) {
    const int64_t left = group.num_rows - row;
    if (row > 0) copier = PanelCopier<Weights>(group.weights, panel, memory.ring);
    if (kProducts == 1 || left <= kProductRows) {
      PanelTimesRows<1>(x, rows, group, panel, row, copier, memory);
    } else if (left <= 2 * kProductRows) {
      PanelTimesRows<2>(x, rows, group, panel, row, copier, memory);
    } else {
      PanelTimesRows<kMaxProducts>(x, rows, group, panel, row, copier, memory);
    }
  }
}

// With one product at a time there are registers for more blocks.
constexpr int PanelBlocks(int products) { return BlocksOfMultiprocessor(products == 1 ? 5 : 2); }

// A block per panel of each group.
template <typename Weights, int kProducts>
__global__ void __launch_bounds__(kMatmulThreads, PanelBlocks(kProducts))
    TernaryMatmulKernel(QuantizedRows x, TernaryGroups groups) {
  __shared__ PanelMemory<Weights, kProducts> memory;
  const TernaryGroups::Panel at = groups.PanelAt(static_cast<int>(blockIdx.x));
  const TernaryGroup& group = groups.group[at.group];
  PanelCopier<Weights> copier(group.weights, at.panel, memory.ring);
  AwaitOpsBefore();
  PanelTimesGroup<kProducts>(x, RowMap{group.row_begin}, group, at.panel, copier, memory);
}

// A block per panel, expert that has rows, and matrix.
template <typename Weights, int kProducts>
__global__ void __launch_bounds__(kMatmulThreads, PanelBlocks(kProducts))
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
  const int panel = static_cast<int>(blockIdx.x);
  PanelCopier<Weights> copier(group.weights, panel, memory.ring);
  const RowMap rows = {begin, args.order, args.k};
  PanelTimesGroup<kProducts>(args.x, rows, group, panel, copier, memory);
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
