#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/limits.h"
#include "kernels/cuda/ptx.cuh"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kThreads = 256;
constexpr int kColumns = 128;  // of a warpgroup's product
constexpr int kRounds = 64;
constexpr int kPairs = 4;  // of products of a warpgroup (or as many of its warps), in a round
constexpr int64_t kMacsPerRound = int64_t{2} * kPairs * 64 * kColumns * 32;  // by a warpgroup

struct Operand {
  alignas(128) uint4 chunks[2][kColumns];
};

// Does nothing but multiply what is in registers (and, on warpgroups, a little shared memory).
// Random operands: chips are faster on zeros.
__global__ void __launch_bounds__(kThreads) MultiplyKernel(int32_t* out) {
  AwaitOpsBefore();
  __shared__ Operand operand;
  uint32_t seed = (blockIdx.x * kThreads + threadIdx.x) * 2654435761u + 1;
  const auto next = [&] { return seed = seed * 1664525u + 1013904223u; };
  ForEach(kColumns, [&](int64_t i) {
    for (auto& chunk : operand.chunks) chunk[i] = {next(), next(), next(), next()};
  });
  uint32_t a[2][4];
  for (uint32_t(&tile)[4] : a) {
    for (uint32_t& word : tile) word = next() & 0x01010101;
  }
  int32_t sums[kColumns / 8][4] = {};
  ShowSharedToProducts();
  __syncthreads();
  if (HasWarpgroups()) {
    const uint64_t b = SharedOperand(operand.chunks[0]);
    for (int round = 0; round < kRounds; ++round) {
      BeginProducts(a);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        MultiplyWarpgroup<kColumns>(a[0], b, sums);
        MultiplyWarpgroup<kColumns>(a[1], b, sums);
      }
      EndProducts();
      WaitForProducts<0>();
    }
  } else {
    for (int round = 0; round < kRounds * kPairs; ++round) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        MultiplyTile(a[0], {a[1][0], a[1][1]}, sums[n]);
        MultiplyTile(a[1], {a[0][0], a[0][1]}, sums[n]);
      }
    }
  }
  int32_t sum = 0;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) sum += sums[n][0] + sums[n][1] + sums[n][2] + sums[n][3];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// ---- Measuring

// Of the fastest of some runs of `enqueue`, which takes a few milliseconds.
template <typename F>
double FastestSeconds(cudaStream_t stream, F enqueue) {
  using Clock = std::chrono::steady_clock;
  double fastest = 1e9;
  for (int run = 0; run < 10; ++run) {
    cuda::Note(cudaStreamSynchronize(stream));
    const Clock::time_point start = Clock::now();
    enqueue();
    cuda::Note(cudaStreamSynchronize(stream));
    fastest = std::min(fastest, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return fastest;
}

// Of the device in use.
bool GetProperties(cudaDeviceProp* properties) {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaGetDeviceProperties(properties, device) == cudaSuccess;
}

double CopiedBytesPerSecond(Executor& executor, const cudaDeviceProp& properties) {
  const cudaStream_t stream = static_cast<cudaStream_t>(executor.stream);
  const size_t bytes = std::min(size_t{256} << 20, properties.totalGlobalMem / 8);
  const base::Buffer from(bytes, *executor.memory);
  base::Buffer to(bytes, *executor.memory);
  constexpr int kCopies = 32;
  const double seconds = FastestSeconds(stream, [&] {
    for (int i = 0; i < kCopies; ++i) {
      cuda::Note(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDefault, stream));
    }
  });
  return 2.0 * kCopies * static_cast<double>(bytes) / seconds;
}

double MacsPerSecond(Executor& executor, const cudaDeviceProp& properties) {
  const int blocks = 2 * properties.multiProcessorCount;
  constexpr int kLaunches = 8;
  base::Array<int32_t> out(int64_t{blocks} * kThreads, *executor.memory);
  const double seconds = FastestSeconds(static_cast<cudaStream_t>(executor.stream), [&] {
    for (int i = 0; i < kLaunches; ++i) {
      Launch(MultiplyKernel, dim3(blocks), kThreads, executor, out.data());
    }
  });
  constexpr int kWarpgroups = kThreads / (4 * kWarp);
  return static_cast<double>(kMacsPerRound * kRounds * kWarpgroups * blocks * kLaunches) / seconds;
}

}  // namespace

double DeviceCopyBandwidth(Executor& executor) {
  cudaDeviceProp properties;
  return GetProperties(&properties) ? CopiedBytesPerSecond(executor, properties) : 0;
}

DeviceLimits MeasureDeviceLimits(Executor& executor) {
  cudaDeviceProp properties;
  if (!GetProperties(&properties)) return {};
  return {properties.name, CopiedBytesPerSecond(executor, properties),
          MacsPerSecond(executor, properties)};
}

}  // namespace ternion::kernels
