// What the CUDA ops share: launching, and the arithmetic that gives the same bits as a CPU.
//
// These files are compiled without fused multiply-adds (-fmad=false), with exact division and
// square root and with denormals; sums run in the order that kernels/kernels.h fixes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/checked.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/kernels.h"

namespace ternion::kernels {
namespace {

constexpr int kLanes = 16;
constexpr int kRowLanes = 64;  // of what norms and quantization sum up over a row
constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block
constexpr unsigned kFullWarp = ~0u;

// Of blocks that a multiprocessor shall have room for: before sm_80 it has fewer threads and less
// shared memory.
constexpr int BlocksOfMultiprocessor(int most) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return most > 2 ? 2 : 1;
#else
  return most;
#endif
}

// Whether blocks may start before the op before theirs is done: from sm_90 on, where kernels'
// AwaitOpsBefore waits. A process uses one device, or several alike.
inline bool StartsEarly() {
  static const bool early = [] {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  return early;
}

// Enqueues the kernel, which begins with AwaitOpsBefore. What goes wrong is reported by whoever
// waits for the executor.
template <typename... Parameters, typename... Arguments>
void Launch(void (*kernel)(Parameters...), dim3 grid, int threads, Executor& executor,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(executor.stream);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = StartsEarly() ? 1 : 0;
  cuda::Note(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Threads for a block that walks `count` elements: whole warps, at most `most`.
inline int ThreadsFor(int64_t count, int most = 256) {
  const int64_t rounded = base::RoundUp(count, kWarp);
  return rounded < kWarp ? kWarp : rounded < most ? static_cast<int>(rounded) : most;
}

inline unsigned Blocks(int64_t count) { return static_cast<unsigned>(count); }

// ---- Inside a block

// f(i) for i < n, dealt out to the threads of the block.
template <typename F>
__device__ __forceinline__ void ForEach(int64_t n, F f) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
}

// The sum of value(i), i < n, in the order of the CPU's lanes, of which there are kNumLanes: lane l
// adds elements kNumLanes i + l in ascending i, then lanes are added pairwise. All threads call it
// and get the sum.
template <int kNumLanes, typename F>
__device__ inline float LaneSum(int64_t n, F value) {
  constexpr int kAtOnce = 8;  // loads under way, so that a lane waits for its additions alone
  __shared__ float lanes[kNumLanes];
  __shared__ float total;
  for (int lane = threadIdx.x; lane < kNumLanes; lane += blockDim.x) {
    float sum = 0;
    int64_t i = lane;
    for (; i + (kAtOnce - 1) * kNumLanes < n; i += kAtOnce * kNumLanes) {
      float terms[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) terms[j] = value(i + j * kNumLanes);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) sum = sum + terms[j];
    }
    for (; i < n; i += kNumLanes) sum = sum + value(i);
    lanes[lane] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    static_assert(kNumLanes <= 2 * kWarp);
    float sum = lanes[threadIdx.x % kNumLanes];
    if constexpr (kNumLanes > kWarp) sum = sum + lanes[threadIdx.x + kWarp];
    for (int distance = (kNumLanes < kWarp ? kNumLanes : kWarp) / 2; distance > 0; distance /= 2) {
      sum = sum + __shfl_xor_sync(kFullWarp, sum, distance);
    }
    if (threadIdx.x == 0) total = sum;
  }
  __syncthreads();
  return total;
}

// join over all threads of the block, of an operation whose order does not matter; all get it.
template <typename T, typename F>
__device__ inline T BlockReduce(T value, F join) {
  __shared__ T of_warps[kMaxWarps];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = join(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  __syncthreads();  // nobody still reads what an earlier call left
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) value = join(value, of_warps[warp]);
  return value;
}

// ---- Floats, as in kernels/cpu/simd.h

__device__ inline float Infinity() { return __uint_as_float(0x7f800000); }
__device__ inline float QuietNan() { return __uint_as_float(0x7fc00000); }

// A NaN on either side gives b.
__device__ inline float Max(float a, float b) { return a > b ? a : b; }
__device__ inline float Min(float a, float b) { return a < b ? a : b; }

constexpr float kRoundMagic = 12582912.0f;                                          // 1.5 * 2^23
__device__ inline float Round(float x) { return (x + kRoundMagic) - kRoundMagic; }  // |x| <= 2^22
__device__ inline float Floor(float x) {
  const float nearest = Round(x);
  return x < nearest ? nearest - 1.0f : nearest;
}
// NaN becomes `low`.
__device__ inline float RoundWithin(float x, float low, float high) {
  return Round(Min(Max(x, low), high));
}

__device__ inline float Exp(float x) {
  constexpr float kLowest = -87.33f;
  const float clamped = Max(kLowest, Min(88.37f, x));
  const float shifted = clamped * 1.44269504f + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * (r * r) + r) + 1.0f;
  return x < kLowest ? 0.0f
                     : __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// ---- Numbers of two bytes

__device__ inline float FromBf16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
__device__ inline uint16_t ToBf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}
__device__ inline uint16_t LoadU16(const uint8_t* p) {  // of any alignment
  return static_cast<uint16_t>(p[0] | p[1] << 8);
}
__device__ inline void StoreU16(uint16_t value, uint8_t* p) {
  p[0] = static_cast<uint8_t>(value);
  p[1] = static_cast<uint8_t>(value >> 8);
}

// ---- Operands of tensor cores (ptx.cuh)

// The A operands of a product, of which `word` has one in field f of each byte: see kTiles.
__device__ __forceinline__ void UnpackTile(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int f = 0; f < 4; ++f) a[f] = word >> 2 * f & 0x03030303;
}

// The way back.
__device__ __forceinline__ uint32_t PackTile(const uint32_t (&a)[4]) {
  return a[0] | a[1] << 2 | a[2] << 4 | a[3] << 6;
}

constexpr int kCoreRows = 8;

// The B operand of a warpgroup's product with N rows and two chunks of 16 columns from `chunk` on
// (PTX ISA, matrix descriptor; K-major, no swizzle): in units of 16 bytes, its address, from bit 16
// on the way to the next chunk, from bit 32 on that to the next core, which is eight rows.
template <int N>
__device__ inline uint64_t SharedOperand(const uint4 (&chunk)[N]) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(chunk));
  return (address & 0x3ffff) >> 4 | uint64_t{N} << 16 | uint64_t{kCoreRows} << 32;
}

}  // namespace
}  // namespace ternion::kernels
