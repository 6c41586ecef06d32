// The ternary product of many rows, by tiles: a block multiplies kTilePanels panels with up to
// kMaxTileRows rows of x, 64 columns at a step. Steps are copied to shared memory ahead of time;
// from there codes go to registers as A operands, as they are, and rows of x to the tensor cores.
#include "kernels/cuda/ternary_schedule.h"
#include "kernels/cuda/ternary_weights.cuh"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kTileThreads = kTilePanels * kWarp;       // a warp per panel, a warpgroup per four
constexpr int kTileBlocks = BlocksOfMultiprocessor(2);  // one stores while one multiplies
constexpr int kChunks = 4;  // of 16 columns, in a step; two of them are a product

// One step's operands, with N rows of x. These lie as tensor cores take a B operand: eight rows of
// a chunk are 128 bytes in a row, a core.
template <typename Weights, int N>
struct Stage {
  uint4 x[kChunks][N];
  typename Weights::Block weights[kTilePanels];  // of a block's first step: what warps read
};

struct TileMemory {
  static constexpr int kRingBytes = 45 << 10;
  alignas(128) uint8_t ring[kRingBytes];  // of stages, as many as there is room for
  // For the end, so that no registers hold it meanwhile.
  float* y;
  int64_t num_outputs;
  int y_stride;
  int num_rows;
  float scales[kMaxTileRows];  // what a row's integers are worth
  int32_t sums[kMaxTileRows];  // to be subtracted
};

// An even number, so that operands of steps can take turns.
template <typename Weights, int N>
constexpr int kStages = TileMemory::kRingBytes / sizeof(Stage<Weights, N>) / 2 * 2;

__device__ inline int64_t OwnPanel() {
  return int64_t{blockIdx.x} * kTilePanels + threadIdx.x / kWarp;
}

// Copies steps of a tile. The tile's last rows and panels may lie behind those of the group: then
// the last there is is copied in their place, and nothing is stored.
template <typename Weights, int N>
class TileCopier {
 public:
  __device__ TileCopier(const QuantizedRows& x, const RowMap& rows, const TernaryGroup& tile)
      : num_steps_(static_cast<int>(base::CeilDiv(tile.weights.columns, kTileColumns))) {
    const int64_t panel = OwnPanel(), last_panel = tile.weights.num_panels() - 1;
    weights_ = tile.weights.codes +
               (panel < last_panel ? panel : last_panel) * tile.weights.stride_bytes();
    weights_ = Weights::PieceOf(weights_, threadIdx.x % kWarp);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row = RowOfCopy(i), last = tile.num_rows - 1;
      x_[i] = x.codes + rows(row < last ? row : last) * x.stride + 16 * OwnChunk();
    }
  }

  __device__ int num_steps() const { return num_steps_; }

  // All threads; each waits for its own copies. A step behind the last has codes 0, and adds
  // nothing whatever x holds.
  __device__ __forceinline__ void Start(int step, Stage<Weights, N>& stage) const {
    const int lane = threadIdx.x % kWarp;
    typename Weights::Block& weights = stage.weights[threadIdx.x / kWarp];
    if (step < num_steps_) {
      Weights::StartCopyOf(step, weights_, lane, weights);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (N % kCopiedRows != 0 && RowOfCopy(i) >= N) continue;
        StartCopy<sizeof(uint4)>(x_[i] + int64_t{step} * kTileColumns,
                                 &stage.x[OwnChunk()][RowOfCopy(i)]);
      }
    } else {
      Weights::ClearOf(lane, weights);
    }
    EndCopies();
  }

 private:
  static constexpr int kCopiedRows = kTileThreads / kChunks;  // at a time
  static constexpr int kCopies = (N + kCopiedRows - 1) / kCopiedRows;

  __device__ static int OwnChunk() { return threadIdx.x % kChunks; }
  __device__ static int RowOfCopy(int i) {
    return i * kCopiedRows + static_cast<int>(threadIdx.x) / kChunks;
  }

  const int8_t* x_[kCopies];
  const uint8_t* weights_;
  int num_steps_;
};

// From a thread's words (kTiles), which are of chunk q = t % 4, those of columns 4q .. 4q + 3 of
// all chunks: four threads transpose. A word's lower and upper nibbles are four columns each; the
// chunks go to x lower, x upper, y lower and y upper.
__device__ __forceinline__ uint2 WordsOfChunks(uint2 own) {
  constexpr uint32_t kLower = 0x0f0f0f0f, kUpper = 0xf0f0f0f0;
  const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
  const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? own.x : own.y, 2);
  const uint32_t x = upper ? other : own.x, y = upper ? own.y : other;
  // Of both, the neighbour gets the nibbles that are not ours.
  const int up = odd ? 4 : 0, down = 4 - up;
  const uint32_t given = (x >> down & kLower) | (y << up & kUpper);
  const uint32_t got = __shfl_xor_sync(kFullWarp, given, 1);
  const uint32_t ours = odd ? kUpper : kLower;
  return {(x & ours) | (got << down & ~ours), (y & ours) | (got >> up & ~ours)};
}

// The A operands of a step's two products.
using StepOperands = uint32_t[2][4];

// The same for what lies `distance` behind it.
__device__ inline uint64_t Behind(uint64_t operand, size_t distance) {
  return operand + distance / sizeof(uint4);
}

// sums += a product, by a warp alone.
template <int N>
__device__ __forceinline__ void MultiplyChunks(const uint32_t (&a)[4], const uint4 (*chunks)[N],
                                               int32_t (&sums)[N / 8][4]) {
  const uint32_t* const left = reinterpret_cast<const uint32_t*>(chunks[0]);
  const uint32_t* const right = reinterpret_cast<const uint32_t*>(chunks[1]);
#pragma unroll
  for (int n = 0; n < N / kCoreRows; ++n) {
    const int word = n * kWarp + threadIdx.x % kWarp;
    MultiplyTile(a, {left[word], right[word]}, sums[n]);
  }
}

// sums += the product of the tile. Behind a step's barrier the operands of that step are there for
// all warps, and all have waited for the products of the last step but one: its stage is free.
template <typename Weights, int N>
__device__ __forceinline__ void MultiplySteps(const TileCopier<Weights, N>& copier,
                                              Stage<Weights, N>* stages,
                                              int32_t (&sums)[N / 8][4]) {
  constexpr int kRing = kStages<Weights, N>, kAhead = kRing - 2;
  const uint64_t operand = SharedOperand(stages[0].x[0]);
  StepOperands even, odd;
  const auto arrive = [&](int stage, StepOperands& a) {
    WaitForCopies<kAhead - 1>();
    ShowSharedToProducts();
    const int step = stage % Weights::kSteps;  // of its block
    const uint2 words = WordsOfChunks(Weights::TilesOf(
        step, stages[stage - step].weights[threadIdx.x / kWarp], threadIdx.x % kWarp));
    WaitForProducts<1>();  // those that `a` was for are done
    UnpackTile(words.x, a[0]);
    UnpackTile(words.y, a[1]);
  };
  const auto multiply = [&](int step, int stage, StepOperands& a, StepOperands& of_next) {
    __syncthreads();
    BeginProducts(a);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (HasWarpgroups()) {
        const size_t distance = stage * sizeof(stages[0]) + p * sizeof(stages->x[0]) * 2;
        MultiplyWarpgroup<N>(a[p], Behind(operand, distance), sums);
      } else {
        MultiplyChunks<N>(a[p], stages[stage].x + 2 * p, sums);
      }
    }
    EndProducts();
    copier.Start(step + kAhead, stages[(stage + kAhead) % kRing]);
    arrive((stage + 1) % kRing, of_next);
  };
#pragma unroll
  for (int step = 0; step < kAhead; ++step) copier.Start(step, stages[step]);
  arrive(0, even);
  for (int first = 0; first < copier.num_steps(); first += kRing) {
#pragma unroll
    for (int stage = 0; stage < kRing; stage += 2) {
      if (first + stage >= copier.num_steps()) break;
      multiply(first + stage, stage, even, odd);
      multiply(first + stage + 1, stage + 1, odd, even);
    }
  }
  WaitForProducts<0>();
}

// Eight threads have outputs next to each other of a row of y: a sector of 32 bytes.
template <int N>
__device__ __forceinline__ void StoreTile(const TileMemory& memory,
                                          const int32_t (&sums)[N / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  const int64_t output = OwnPanel() * kPanelRows + lane / 4;
  const int64_t num_outputs = memory.num_outputs - output;
  const int num_rows = memory.num_rows, y_stride = memory.y_stride;
  float* const y = memory.y + output;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 8 * n + 2 * (lane % 4) + i;
      if (row >= num_rows) continue;
      const int32_t sum = memory.sums[row];
      const float scale = memory.scales[row];
      float* const to = y + int64_t{row} * y_stride;
      if (num_outputs > 0) to[0] = static_cast<float>(sums[n][i] - sum) * scale;
      if (num_outputs > 8) to[8] = static_cast<float>(sums[n][i + 2] - sum) * scale;
    }
  }
}

template <typename Weights, int N>
__device__ inline void TileProduct(const QuantizedRows& x, const RowMap& rows,
                                   const TernaryGroup& tile, TileMemory& memory) {
  if (threadIdx.x == 0) {
    memory.y = tile.y;
    memory.y_stride = static_cast<int>(tile.y_stride);
    memory.num_rows = static_cast<int>(tile.num_rows);
    memory.num_outputs = tile.weights.rows;
  }
  ForEach(tile.num_rows, [&](int64_t row) {
    const int64_t x_row = rows(row);
    memory.scales[row] = tile.weights.scale * x.scales[x_row];
    memory.sums[row] = x.sums[x_row];
  });
  int32_t sums[N / 8][4] = {};
  MultiplySteps(TileCopier<Weights, N>(x, rows, tile),
                reinterpret_cast<Stage<Weights, N>*>(memory.ring), sums);
  StoreTile<N>(memory, sums);
}

// The block's panels times rows `first` .. first + num_rows - 1 of the group, which `rows` begins
// with.
template <typename Weights>
__device__ inline void PanelsTimesRows(const QuantizedRows& x, const RowMap& rows,
                                       const TernaryGroup& group, int64_t first, int64_t num_rows) {
  __shared__ TileMemory memory;
  TernaryGroup tile = group;
  tile.num_rows = num_rows;
  tile.y += first * group.y_stride;
  if (num_rows <= 32) {
    TileProduct<Weights, 32>(x, rows, tile, memory);
  } else if (num_rows <= 64) {
    TileProduct<Weights, 64>(x, rows, tile, memory);
  } else if (num_rows <= 96) {
    TileProduct<Weights, 96>(x, rows, tile, memory);
  } else {
    TileProduct<Weights, 128>(x, rows, tile, memory);
  }
}

// A block per tile and group.
template <typename Weights>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    TernaryTilesKernel(QuantizedRows x, TernaryGroups groups, int tile_rows) {
  AwaitOpsBefore();
  const TernaryGroup& group = groups.group[blockIdx.z];
  const int64_t first = int64_t{blockIdx.y} * tile_rows, left = group.num_rows - first;
  if (left <= 0 || int64_t{blockIdx.x} * kTilePanels >= group.weights.num_panels()) return;
  PanelsTimesRows<Weights>(x, RowMap{group.row_begin + first}, group, first,
                           left < tile_rows ? left : tile_rows);
}

// A block per panels, slot and matrix.
template <typename Weights>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    ExpertTilesKernel(ExpertMatmulArgs args, int tile_rows) {
  AwaitOpsBefore();
  const RowTile tile =
      TileOfSlot(static_cast<int32_t>(blockIdx.y), args.begin, args.num_experts, tile_rows);
  if (tile.num_rows == 0) return;
  const ExpertMatrices& of = args.matrices[blockIdx.z];
  const TernaryGroup all = {.weights = of.weights[tile.expert], .y = of.y, .y_stride = args.rows};
  PanelsTimesRows<Weights>(args.x, RowMap{tile.first, args.order, args.k}, all, tile.first,
                           tile.num_rows);
}

}  // namespace

// ---- Launchers

namespace cuda {

void TernaryTiles(const QuantizedRows& x, const TernaryGroups& groups, int tile_rows,
                  Executor& executor) {
  const dim3 grid(Blocks(base::CeilDiv(groups.max_panels, kTilePanels)),
                  Blocks(base::CeilDiv(groups.max_rows, tile_rows)), Blocks(groups.count));
  WithWeights(groups.group[0].weights.layout, [&](auto weights) {
    Launch(TernaryTilesKernel<decltype(weights)>, grid, kTileThreads, executor, x, groups,
           tile_rows);
  });
}

void ExpertTiles(const ExpertMatmulArgs& args, int tile_rows, Executor& executor) {
  const int64_t panels = base::CeilDiv(args.rows, kPanelRows);
  const dim3 grid(Blocks(base::CeilDiv(panels, kTilePanels)),
                  Blocks(NumTileSlots(args.num_routes, args.num_experts, tile_rows)),
                  Blocks(args.num_matrices));
  WithWeights(args.layout, [&](auto weights) {
    Launch(ExpertTilesKernel<decltype(weights)>, grid, kTileThreads, executor, args, tile_rows);
  });
}

}  // namespace cuda
}  // namespace ternion::kernels
