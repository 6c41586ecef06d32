// Products with dense matrices (the head and the gate), and the gate's choice.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// Four threads share an output: thread q adds lanes 4 q .. 4 q + 3. A warp has eight outputs.
constexpr int kLanesOfThread = 4;
constexpr int kThreadsOfOutput = kLanes / kLanesOfThread;
constexpr int kOutputsOfWarp = kWarp / kThreadsOfOutput;
constexpr int kDenseRows = 8;  // rows of x that pass over the weights together
constexpr int kMaxDenseWarps = 4;

__device__ inline float ValueOf(float weight) { return weight; }
__device__ inline float ValueOf(uint16_t weight) { return FromBf16(weight); }

// Four elements next to each other, in one load.
template <typename T>
__device__ inline void LoadLanes(const void* from, float (&lanes)[kLanesOfThread]) {
  struct alignas(kLanesOfThread * sizeof(T)) Lanes {
    T lane[kLanesOfThread];
  };
  const Lanes loaded = *static_cast<const Lanes*>(from);
#pragma unroll
  for (int l = 0; l < kLanesOfThread; ++l) lanes[l] = ValueOf(loaded.lane[l]);
}

// What the four threads of an output have of R rows from `first` on.
template <int R>
__device__ inline void StoreSums(const DenseMatmulArgs& args, int64_t first, int64_t output,
                                 float (&sums)[R][kLanesOfThread]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    // Lanes l and l + 8 are two threads apart, l and l + 4 one; the rest are this thread's.
    float(&sum)[kLanesOfThread] = sums[r];
#pragma unroll
    for (int l = 0; l < kLanesOfThread; ++l) {
      sum[l] = sum[l] + __shfl_xor_sync(kFullWarp, sum[l], 2);
      sum[l] = sum[l] + __shfl_xor_sync(kFullWarp, sum[l], 1);
    }
    const float total = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    const bool is_first = threadIdx.x % kThreadsOfOutput == 0;
    if (is_first && output < args.weights.rows && first + r < args.num_rows) {
      args.y[(first + r) * args.y_stride + output] = total;
    }
  }
}

// Rows of weights in chunks of so many bytes; some of a warp's eight are under way while it works
// on one.
constexpr int kChunkBytes = 256;

template <typename W, int kWarps>
struct DenseMemory {
  static constexpr int kStages = 4 * kMaxDenseWarps / kWarps;  // of a warp
  // What threads of eight outputs load at once is in different banks.
  static constexpr int kPitch = kChunkBytes + 4 * kLanesOfThread * sizeof(W);
  struct Chunk {
    alignas(16) uint8_t output[kOutputsOfWarp][kPitch];
  };
  Chunk ring[kWarps][kStages];
};

// Copies the chunks of a warp's outputs from `output` on ahead of time.
template <typename W, int kWarps>
class ChunkCopier {
 public:
  using Memory = DenseMemory<W, kWarps>;
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
    for (int o = lane / kPieces; o < kOutputsOfWarp; o += kOutputsAtOnce) {
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

// R rows of x from `first` on; behind the last, that one again. The copier has begun.
template <int R, typename W, int kWarps>
__device__ inline void DotRows(const DenseMatmulArgs& args, int64_t first, int64_t first_output,
                               const ChunkCopier<W, kWarps>& copier) {
  constexpr int kSteps = kChunkBytes / sizeof(W) / kLanes;  // of a chunk
  const int output = threadIdx.x % kWarp / kThreadsOfOutput;
  const int own_lanes = threadIdx.x % kThreadsOfOutput * kLanesOfThread;
  const float* x[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = first + r, last = args.num_rows - 1;
    x[r] = args.x + (row < last ? row : last) * args.x_stride + own_lanes;
  }
  float sums[R][kLanesOfThread] = {};
  const auto add = [&](const uint8_t* weights, int step, int in_chunk) {
    float w[kLanesOfThread];
    LoadLanes<W>(weights + (in_chunk * kLanes + own_lanes) * sizeof(W), w);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v[kLanesOfThread];
      LoadLanes<float>(x[r] + step * kLanes, v);
#pragma unroll
      for (int l = 0; l < kLanesOfThread; ++l) sums[r][l] = sums[r][l] + v[l] * w[l];
    }
  };
  const int num_steps = static_cast<int>(args.weights.columns) / kLanes;
  int i = 0;
  for (; (i + 1) * kSteps <= num_steps; ++i) {
    const uint8_t* const weights = copier.Wait(i).output[output];
#pragma unroll(R == 1 ? kSteps : 2)
    for (int s = 0; s < kSteps; ++s) add(weights, i * kSteps + s, s);
  }
  if (i * kSteps < num_steps) {
    const uint8_t* const weights = copier.Wait(i).output[output];
    for (int s = 0; i * kSteps + s < num_steps; ++s) add(weights, i * kSteps + s, s);
  }
  StoreSums(args, first, first_output + output, sums);
}

// Of a multiprocessor, so that registers suffice for R rows; shared memory is enough for five.
constexpr int DenseBlocks(int R) { return R == kDenseRows ? 3 : 5; }

// A warp per eight outputs and R rows of x: groups of rows come one after the other, so that the
// weights that they share are read from memory once.
template <typename W, int kWarps, int R>
__global__ void __launch_bounds__(kWarps* kWarp, DenseBlocks(R))
    DenseMatmulKernel(DenseMatmulArgs args, int row_groups) {
  __shared__ DenseMemory<W, kWarps> memory;
  const int64_t warp = int64_t{blockIdx.x} / row_groups * kWarps + threadIdx.x / kWarp;
  const int64_t output = warp * kOutputsOfWarp;
  const ChunkCopier<W, kWarps> copier(args.weights, output, memory);
  copier.Begin();
  AwaitOpsBefore();
  DotRows<R>(args, int64_t{blockIdx.x} % row_groups * R, output, copier);
}

// The same for any shape and alignment: a block, of one warp, per eight outputs and row of x.
template <typename W>
__global__ void AnyDenseMatmulKernel(DenseMatmulArgs args) {
  AwaitOpsBefore();
  const int64_t output = int64_t{blockIdx.x} * kOutputsOfWarp + threadIdx.x / kThreadsOfOutput;
  const int64_t row = blockIdx.y, columns = args.weights.columns;
  const float* const x = args.x + row * args.x_stride;
  const W* const weights = static_cast<const W*>(args.weights.data) + output * columns;
  float sums[1][kLanesOfThread] = {};
  if (output < args.weights.rows) {
    for (int64_t i = threadIdx.x % kThreadsOfOutput * kLanesOfThread; i < columns; i += kLanes) {
#pragma unroll
      for (int l = 0; l < kLanesOfThread; ++l) {
        if (i + l < columns) sums[0][l] = sums[0][l] + x[i + l] * ValueOf(weights[i + l]);
      }
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

constexpr int kStagedExperts =
    2048;  // whose probabilities are at hand; of more, they are made anew

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

// With fewer blocks than this, of fewer outputs each, more multiprocessors have something to do.
constexpr int64_t kManyDenseBlocks = 256;

template <typename W, int kWarps, int R>
void StreamWeights(const DenseMatmulArgs& args, Executor& executor) {
  const int64_t row_groups = base::CeilDiv(args.num_rows, R);
  const int64_t blocks = base::CeilDiv(args.weights.rows, kWarps * kOutputsOfWarp) * row_groups;
  Launch(DenseMatmulKernel<W, kWarps, R>, Blocks(blocks), kWarps * kWarp, executor, args,
         static_cast<int>(row_groups));
}

template <typename W, int kWarps>
void StreamWeightsOnce(const DenseMatmulArgs& args, Executor& executor) {
  if (args.num_rows == 1) return StreamWeights<W, kWarps, 1>(args, executor);
  if (args.num_rows <= 4) return StreamWeights<W, kWarps, 4>(args, executor);
  StreamWeights<W, kWarps, kDenseRows>(args, executor);
}

// Whether rows of both are whole pieces of 16 bytes, and whole steps of all lanes.
bool IsAligned(const DenseMatmulArgs& args) {
  const auto whole = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return whole(args.x) && whole(args.weights.data) && args.x_stride % kLanesOfThread == 0 &&
         args.weights.columns % kLanes == 0;
}

template <typename W>
void DenseMatmulOf(const DenseMatmulArgs& args, Executor& executor) {
  if (args.num_rows == 0) return;
  if (!IsAligned(args)) {
    const dim3 grid(Blocks(base::CeilDiv(args.weights.rows, kOutputsOfWarp)),
                    Blocks(args.num_rows));
    return Launch(AnyDenseMatmulKernel<W>, grid, kWarp, executor, args);
  }
  if (args.weights.rows * args.num_rows < kManyDenseBlocks * kMaxDenseWarps * kOutputsOfWarp) {
    return StreamWeightsOnce<W, 1>(args, executor);
  }
  StreamWeightsOnce<W, kMaxDenseWarps>(args, executor);
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
