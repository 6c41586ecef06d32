// Products with dense matrices (the head and the gate), and the gate's choice.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// kLanes / L threads share an output: thread q adds lanes L q .. L q + L - 1. L is 4, or 1 where
// outputs are so few that more threads shall have something to do.
constexpr int kMostLanes = 4;
template <int L>
constexpr int kThreadsOfOutput = kLanes / L;
template <int L>
constexpr int kOutputsOfWarp = kWarp / kThreadsOfOutput<L>;

constexpr int kDenseRows = 8;  // rows of x that pass over the weights together
constexpr int kMaxDenseWarps = 4;

__device__ inline float ValueOf(float weight) { return weight; }
__device__ inline float ValueOf(uint16_t weight) { return FromBf16(weight); }

// L elements next to each other, in one load.
template <typename T, int L>
__device__ inline void LoadLanes(const void* from, float (&lanes)[L]) {
  struct alignas(L * sizeof(T)) Lanes {
    T lane[L];
  };
  const Lanes loaded = *static_cast<const Lanes*>(from);
#pragma unroll
  for (int l = 0; l < L; ++l) lanes[l] = ValueOf(loaded.lane[l]);
}

// What the threads of an output have of R rows from `first` on.
template <int R, int L>
__device__ inline void StoreSums(const DenseMatmulArgs& args, int64_t first, int64_t output,
                                 float (&sums)[R][L]) {
  static_assert(L == 1 || L == 4);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    // Lanes l and l + 8 first, then l + 4, and so on: of other threads down to L, then our own.
    float(&sum)[L] = sums[r];
#pragma unroll
    for (int distance = kThreadsOfOutput<L> / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int l = 0; l < L; ++l) sum[l] = sum[l] + __shfl_xor_sync(kFullWarp, sum[l], distance);
    }
    float total = sum[0];
    if constexpr (L == 4) total = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    const bool is_first = threadIdx.x % kThreadsOfOutput<L> == 0;
    if (is_first && output < args.weights.rows && first + r < args.num_rows) {
      args.y[(first + r) * args.y_stride + output] = total;
    }
  }
}

// Rows of weights in chunks of so many bytes; some of a warp's outputs' are under way while it
// works on one.
constexpr int kChunkBytes = 256;

template <typename W, int kWarps, int L>
struct DenseMemory {
  static constexpr int kStages = 4 * kMaxDenseWarps / kWarps;  // of a warp
  // What threads of several outputs load at once is in different banks.
  static constexpr int kPitch = kChunkBytes + 16 * sizeof(W);
  struct Chunk {
    alignas(16) uint8_t output[kOutputsOfWarp<L>][kPitch];
  };
  Chunk ring[kWarps][kStages];
};

// Copies the chunks of a warp's outputs from `output` on ahead of time.
template <typename W, int kWarps, int L>
class ChunkCopier {
 public:
  using Memory = DenseMemory<W, kWarps, L>;
  using Chunk = typename Memory::Chunk;

  __device__ ChunkCopier(const DenseMatrix& weights, int64_t output, Memory& memory)
      : ring_(memory.ring[threadIdx.x / kWarp]),
        row_bytes_(static_cast<int>(weights.columns * sizeof(W))),
        num_outputs_(weights.rows - output),
        rows_(static_cast<const uint8_t*>(weights.data) + output * row_bytes_) {}

  // Weights may be asked for before ops are done that come first: none writes any.
  __device__ void Begin() const {
#pragma unroll
    for (int i = 0; i < Memory::kStages - 1; ++i) Start(i);
  }
  // The i-th chunk, for each i in turn and all lanes together.
  __device__ __forceinline__ const Chunk& Wait(int i) const {
    WaitForCopies<Memory::kStages - 2>();
    __syncwarp();  // so have the other lanes, and they are done with the chunk before
    Start(i + Memory::kStages - 1);
    return ring_[i % Memory::kStages];
  }

 private:
  __device__ __forceinline__ void Start(int i) const {
    constexpr int kPieces = kChunkBytes / sizeof(uint4);  // of an output
    constexpr int kOutputsAtOnce = kWarp / kPieces;
    const int lane = threadIdx.x % kWarp;
    const int at = lane % kPieces * static_cast<int>(sizeof(uint4)), from = i * kChunkBytes + at;
#pragma unroll
    for (int o = lane / kPieces; o < kOutputsOfWarp<L>; o += kOutputsAtOnce) {
      if (o < num_outputs_ && from < row_bytes_) {
        StartCopy<sizeof(uint4)>(rows_ + int64_t{o} * row_bytes_ + from,
                                 &ring_[i % Memory::kStages].output[o][at]);
      }
    }
    EndCopies();
  }

  Chunk* const ring_;
  const int row_bytes_;
  const int64_t num_outputs_;
  const uint8_t* const rows_;
};

// R rows of x times a warp's outputs.
template <typename W, int R, int L>
class DenseProduct {
 public:
  // Of x from row `first` on; behind the last, that one again.
  __device__ DenseProduct(const DenseMatmulArgs& args, int64_t first)
      : num_steps_(static_cast<int>(args.weights.columns) / kLanes) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r, last = args.num_rows - 1;
      x_[r] = args.x + (row < last ? row : last) * args.x_stride + OwnLanes();
    }
  }

  __device__ static int OwnOutput() { return threadIdx.x % kWarp / kThreadsOfOutput<L>; }

  // The copier has begun.
  template <typename Copier>
  __device__ __forceinline__ void Run(const Copier& copier, float (&sums)[R][L]) const {
    const int num_whole = num_steps_ / kSteps;
    // One row's elements for a chunk are loaded a chunk ahead; many rows have enough to do.
    float ahead[R == 1 ? kSteps : 1][L];
    const auto load_ahead = [&](int chunk) {
      if constexpr (R == 1) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          LoadLanes<float>(x_[0] + (chunk * kSteps + s) * kLanes, ahead[s]);
        }
      }
    };
    if (num_whole > 0) load_ahead(0);
    for (int i = 0; i < num_whole; ++i) {
      float now[R == 1 ? kSteps : 1][L];
#pragma unroll
      for (int s = 0; R == 1 && s < kSteps; ++s) {
#pragma unroll
        for (int l = 0; l < L; ++l) now[R == 1 ? s : 0][l] = ahead[R == 1 ? s : 0][l];
      }
      if (i + 1 < num_whole) load_ahead(i + 1);
      const uint8_t* const weights = copier.Wait(i).output[OwnOutput()];
#pragma unroll(R == 1 ? kSteps : 2)
      for (int s = 0; s < kSteps; ++s) {
        if constexpr (R == 1) {
          Add(weights, s, now[s], sums[0]);
        } else {
          AddRows(weights, i * kSteps + s, s, sums);
        }
      }
    }
    if (num_whole * kSteps == num_steps_) return;
    const uint8_t* const weights = copier.Wait(num_whole).output[OwnOutput()];
    for (int s = 0; num_whole * kSteps + s < num_steps_; ++s) {
      AddRows(weights, num_whole * kSteps + s, s, sums);
    }
  }

 private:
  static constexpr int kSteps = kChunkBytes / sizeof(W) / kLanes;  // of a chunk

  __device__ static int OwnLanes() { return threadIdx.x % kThreadsOfOutput<L> * L; }

  __device__ static __forceinline__ void LoadWeights(const uint8_t* chunk, int step,
                                                     float (&w)[L]) {
    LoadLanes<W>(chunk + (step * kLanes + OwnLanes()) * sizeof(W), w);
  }
  __device__ static __forceinline__ void Add(const uint8_t* chunk, int step, const float (&v)[L],
                                             float (&sum)[L]) {
    float w[L];
    LoadWeights(chunk, step, w);
#pragma unroll
    for (int l = 0; l < L; ++l) sum[l] = sum[l] + v[l] * w[l];
  }
  __device__ __forceinline__ void AddRows(const uint8_t* chunk, int step, int in_chunk,
                                          float (&sums)[R][L]) const {
    float w[L];
    LoadWeights(chunk, in_chunk, w);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v[L];
      LoadLanes<float>(x_[r] + step * kLanes, v);
#pragma unroll
      for (int l = 0; l < L; ++l) sums[r][l] = sums[r][l] + v[l] * w[l];
    }
  }

  const int num_steps_;
  const float* x_[R];
};

// Of a multiprocessor, so that registers suffice for R rows; shared memory is enough for five.
constexpr int DenseBlocks(int R) { return R == 1 ? 5 : R == 4 ? 4 : 3; }

// A warp per kOutputsOfWarp outputs and R rows of x: groups of rows come one after the other, so
// that the weights that they share are read from memory once.
template <typename W, int kWarps, int R, int L>
__global__ void __launch_bounds__(kWarps* kWarp, DenseBlocks(R))
    DenseMatmulKernel(DenseMatmulArgs args, int row_groups) {
  __shared__ DenseMemory<W, kWarps, L> memory;
  const int64_t warp = int64_t{blockIdx.x} / row_groups * kWarps + threadIdx.x / kWarp;
  const int64_t output = warp * kOutputsOfWarp<L>;
  const ChunkCopier<W, kWarps, L> copier(args.weights, output, memory);
  copier.Begin();
  AwaitOpsBefore();
  using Product = DenseProduct<W, R, L>;
  const int64_t first = int64_t{blockIdx.x} % row_groups * R;
  float sums[R][L] = {};
  Product(args, first).Run(copier, sums);
  StoreSums(args, first, output + Product::OwnOutput(), sums);
}

// The same for any shape and alignment: a block, of one warp, per kOutputsOfWarp outputs and row.
template <typename W>
__global__ void AnyDenseMatmulKernel(DenseMatmulArgs args) {
  AwaitOpsBefore();
  constexpr int kThreads = kThreadsOfOutput<1>;
  const int64_t output = int64_t{blockIdx.x} * kOutputsOfWarp<1> + threadIdx.x / kThreads;
  const int64_t row = blockIdx.y, columns = args.weights.columns;
  const float* const x = args.x + row * args.x_stride;
  const W* const weights = static_cast<const W*>(args.weights.data) + output * columns;
  float sums[1][1] = {};
  if (output < args.weights.rows) {
    for (int64_t i = threadIdx.x % kThreads; i < columns; i += kLanes) {
      sums[0][0] = sums[0][0] + x[i] * ValueOf(weights[i]);
    }
  }
  StoreSums(args, row, output, sums);
}

// What comes first has the larger key: of probabilities the larger one, of equal ones, and where
// all are NaN, the lower index. No key is 0.
struct GateKey {
  uint32_t probability;  // its bits, which are ordered as it is
  uint32_t index;        // counted from the end
};
__device__ inline bool IsBefore(const GateKey& a, const GateKey& b) {
  return a.probability != b.probability ? a.probability > b.probability : a.index > b.index;
}

// Experts whose probabilities are at hand; those of more are made anew.
constexpr int kStagedExperts = 2048;

// A block (one warp) per row. The j-th choice is the first behind the one before it.
__global__ void GateTopKKernel(GateTopKArgs args) {
  __shared__ uint32_t stage[kStagedExperts];
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int n = args.num_experts;
  const float* logits = args.logits + row * n;
  float top = -Infinity();
  ForEach(n, [&](int64_t i) { top = Max(logits[i], top); });
  top = BlockReduce(top, [](float a, float b) { return Max(a, b); });
  const auto weight = [&](int64_t i) { return Exp(logits[i] - top); };
  const float total = LaneSum<kLanes>(n, weight);
  const auto probability = [&](int64_t i) {
    const float value = weight(i) / total;
    return __float_as_uint(value == value ? value : QuietNan());
  };
  const bool staged = n <= kStagedExperts;
  if (staged) ForEach(n, [&](int64_t i) { stage[i] = probability(i); });
  int32_t* ids = args.ids + row * args.k;
  float* weights = args.weights + row * args.k;
  GateKey last = {~uint32_t{0}, ~uint32_t{0}};
  for (int j = 0; j < args.k; ++j) {
    GateKey best = {0, 0};
    ForEach(n, [&](int64_t i) {
      const GateKey key = {staged ? stage[i] : probability(i), static_cast<uint32_t>(n - i)};
      if (IsBefore(last, key) && IsBefore(key, best)) best = key;
    });
    last.probability = WarpMax(best.probability);
    last.index = WarpMax(best.probability == last.probability ? best.index : uint32_t{0});
    if (threadIdx.x == 0) {
      ids[j] = n - static_cast<int>(last.index);
      weights[j] = __uint_as_float(last.probability);
    }
  }
  __syncthreads();
  if (!args.renormalize) return;
  const float sum = LaneSum<kLanes>(args.k, [&](int64_t i) { return weights[i]; });
  ForEach(args.k, [&](int64_t i) { weights[i] = weights[i] / sum; });
}

// ---- Launching

// With fewer blocks than this, smaller ones of fewer outputs keep more multiprocessors busy.
constexpr int64_t kManyDenseBlocks = 256;

template <typename W, int kWarps, int R, int L>
void StreamWeights(const DenseMatmulArgs& args, Executor& executor) {
  const int64_t row_groups = base::CeilDiv(args.num_rows, R);
  const int64_t blocks = base::CeilDiv(args.weights.rows, kWarps * kOutputsOfWarp<L>) * row_groups;
  Launch(DenseMatmulKernel<W, kWarps, R, L>, Blocks(blocks), kWarps * kWarp, executor, args,
         static_cast<int>(row_groups));
}

constexpr int RowsTogether(int64_t num_rows) {
  return num_rows == 1 ? 1 : num_rows <= 4 ? 4 : kDenseRows;
}

template <typename W, int kWarps, int L>
void StreamWeightsOnce(const DenseMatmulArgs& args, Executor& executor) {
  switch (RowsTogether(args.num_rows)) {
    case 1:
      return StreamWeights<W, kWarps, 1, L>(args, executor);
    case 4:
      return StreamWeights<W, kWarps, 4, L>(args, executor);
    default:
      return StreamWeights<W, kWarps, kDenseRows, L>(args, executor);
  }
}

// Whether rows of both are whole pieces of 16 bytes, and whole steps of all lanes.
bool IsAligned(const DenseMatmulArgs& args) {
  const auto whole = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return whole(args.x) && whole(args.weights.data) && args.x_stride % kMostLanes == 0 &&
         args.weights.columns % kLanes == 0;
}

template <typename W>
void DenseMatmulOf(const DenseMatmulArgs& args, Executor& executor) {
  if (args.num_rows == 0) return;
  if (!IsAligned(args)) {
    const dim3 grid(Blocks(base::CeilDiv(args.weights.rows, kOutputsOfWarp<1>)),
                    Blocks(args.num_rows));
    return Launch(AnyDenseMatmulKernel<W>, grid, kWarp, executor, args);
  }
  constexpr int64_t kOutputs = kMaxDenseWarps * kOutputsOfWarp<kMostLanes>;
  const int64_t blocks = base::CeilDiv(args.weights.rows, kOutputs) *
                         base::CeilDiv(args.num_rows, RowsTogether(args.num_rows));
  if (blocks < kManyDenseBlocks) return StreamWeightsOnce<W, 1, 1>(args, executor);
  StreamWeightsOnce<W, kMaxDenseWarps, kMostLanes>(args, executor);
}

}  // namespace

// ---- Launchers

namespace cuda {

void DenseMatmul(const DenseMatmulArgs& args, Executor& executor) {
  if (args.weights.type == DenseType::kBf16) return DenseMatmulOf<uint16_t>(args, executor);
  DenseMatmulOf<float>(args, executor);
}

void GateTopK(const GateTopKArgs& args, Executor& executor) {
  Launch(GateTopKKernel, Blocks(args.num_rows), kWarp, executor, args);
}

}  // namespace cuda
}  // namespace ternion::kernels
