// Products with dense matrices (the head and the gate), and the gate's choice.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// Four threads share an output: thread q adds lanes 4 q .. 4 q + 3. A warp has eight outputs.
constexpr int kLanesOfThread = 4;
constexpr int kThreadsOfOutput = kLanes / kLanesOfThread;
constexpr int kDenseThreads = 128;
constexpr int kOutputsOfBlock = kDenseThreads / kThreadsOfOutput;
constexpr int kDenseRows = 8;  // rows of x that pass over weights in registers

__device__ inline float ValueOf(float weight) { return weight; }
__device__ inline float ValueOf(uint16_t weight) { return FromBf16(weight); }

// Four elements next to each other; kAligned: in one load.
template <bool kAligned, typename T>
__device__ inline void LoadLanes(const T* from, float (&lanes)[kLanesOfThread]) {
  struct alignas(kAligned ? kLanesOfThread * sizeof(T) : sizeof(T)) Lanes {
    T lane[kLanesOfThread];
  };
  const Lanes loaded = *reinterpret_cast<const Lanes*>(from);
#pragma unroll
  for (int l = 0; l < kLanesOfThread; ++l) lanes[l] = ValueOf(loaded.lane[l]);
}

// R rows of x from `first` on; behind row end - 1, that one again.
template <int R, typename W, bool kAligned>
__device__ inline void DotRows(const DenseMatmulArgs& args, int64_t first, int64_t end,
                               int64_t output) {
  const int quarter = threadIdx.x % kThreadsOfOutput;
  const int64_t columns = args.weights.columns;
  const bool inside = output < args.weights.rows;
  const W* weights = static_cast<const W*>(args.weights.data) + (inside ? output : 0) * columns;
  const float* x[R];
#pragma unroll
  for (int r = 0; r < R; ++r)
    x[r] = args.x + (first + r < end ? first + r : end - 1) * args.x_stride;
  float sums[R][kLanesOfThread] = {};
  int64_t i = quarter * kLanesOfThread;
#pragma unroll 4
  for (; i + kLanesOfThread <= columns; i += kLanes) {
    float w[kLanesOfThread];
    LoadLanes<kAligned>(weights + i, w);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v[kLanesOfThread];
      LoadLanes<kAligned>(x[r] + i, v);
#pragma unroll
      for (int l = 0; l < kLanesOfThread; ++l) sums[r][l] = sums[r][l] + v[l] * w[l];
    }
  }
  if constexpr (!kAligned) {  // the last lanes
#pragma unroll
    for (int l = 0; l < kLanesOfThread; ++l) {
      if (i + l >= columns) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) sums[r][l] = sums[r][l] + x[r][i + l] * ValueOf(weights[i + l]);
    }
  }
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
    if (inside && quarter == 0 && first + r < end) {
      args.y[(first + r) * args.y_stride + output] = total;
    }
  }
}

template <typename W, bool kAligned>
__global__ void __launch_bounds__(kDenseThreads) DenseMatmulKernel(DenseMatmulArgs args) {
  AwaitOpsBefore();
  const int64_t output = int64_t{blockIdx.x} * kOutputsOfBlock + threadIdx.x / kThreadsOfOutput;
  const int64_t first = int64_t{blockIdx.y} * kDenseRows;
  const int64_t end = first + kDenseRows < args.num_rows ? first + kDenseRows : args.num_rows;
  switch (end - first) {
    case 1:
      return DotRows<1, W, kAligned>(args, first, end, output);
    case 2:
      return DotRows<2, W, kAligned>(args, first, end, output);
    case 3:
    case 4:
      return DotRows<4, W, kAligned>(args, first, end, output);
    default:
      return DotRows<kDenseRows, W, kAligned>(args, first, end, output);
  }
}

// Whether four lanes can be loaded at once everywhere.
bool IsAligned(const DenseMatmulArgs& args) {
  const auto whole = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return whole(args.x) && whole(args.weights.data) && args.x_stride % kLanesOfThread == 0 &&
         args.weights.columns % kLanesOfThread == 0;
}

template <typename W>
void DenseMatmulOf(const DenseMatmulArgs& args, Executor& executor) {
  const auto kernel = IsAligned(args) ? DenseMatmulKernel<W, true> : DenseMatmulKernel<W, false>;
  Launch(kernel,
         dim3(Blocks(base::CeilDiv(args.weights.rows, kOutputsOfBlock)),
              Blocks(base::CeilDiv(args.num_rows, kDenseRows))),
         kDenseThreads, executor, args);
}

// Largest value, of equal ones the lowest index; index n is none.
struct Candidate {
  float value;
  int index;
};
__device__ inline bool Before(const Candidate& a, const Candidate& b, int n) {
  if (a.index == n || b.index == n) return b.index == n && a.index != n;
  return a.value > b.value || (!(b.value > a.value) && a.index < b.index);
}

// A block (one warp) per row. The j-th choice is the first behind the one before it; where a logit
// is NaN all probabilities are, and the order is that of the indices.
__global__ void GateTopKKernel(GateTopKArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int n = args.num_experts;
  const float* logits = args.logits + row * n;
  float top = -Infinity();
  ForEach(n, [&](int64_t i) { top = Max(logits[i], top); });
  top = BlockReduce(top, [](float a, float b) { return Max(a, b); });
  const float total = LaneSum(n, [&](int64_t i) { return Exp(logits[i] - top); });
  int32_t* ids = args.ids + row * args.k;
  float* weights = args.weights + row * args.k;
  Candidate last = {0, n};
  for (int j = 0; j < args.k; ++j) {
    Candidate best = {0, n};
    ForEach(n, [&](int64_t i) {
      const Candidate other = {Exp(logits[i] - top) / total, static_cast<int>(i)};
      if ((j == 0 || Before(last, other, n)) && Before(other, best, n)) best = other;
    });
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const Candidate other = {__shfl_xor_sync(kFullWarp, best.value, distance),
                               __shfl_xor_sync(kFullWarp, best.index, distance)};
      if (Before(other, best, n)) best = other;
    }
    last = best;
    if (threadIdx.x == 0) {
      ids[j] = best.index;
      weights[j] = best.value;
    }
  }
  __syncthreads();
  if (!args.renormalize) return;
  const float sum = LaneSum(args.k, [&](int64_t i) { return weights[i]; });
  ForEach(args.k, [&](int64_t i) { weights[i] = weights[i] / sum; });
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
