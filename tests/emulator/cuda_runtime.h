// The part of CUDA that kernels/cuda is written in, on a CPU: its sources compile as C++ against
// this header, and what they launch runs one thread of one block after the other (emulator.h).
//
// Names and behaviour are CUDA's (CUDA C++ Programming Guide; CUDA Runtime API). What is not here
// is not used there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // blocks run one at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// ---- What a thread sees

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace ternion::emulator {

void BlockBarrier();
void WarpBarrier();
// Gives words to the warp and returns what all lanes gave, until the call after the next.
constexpr int kWords = 6;
using WordsOfWarp = const uint32_t (*)[kWords];
WordsOfWarp ExchangeWords(const uint32_t (&words)[kWords]);
int LaneOfThread();
// As the device counts, in 32 bits.
size_t AddressOfShared(const void* data);

template <typename T>
T ShuffleFrom(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint32_t words[kWords] = {};
  std::memcpy(words, &value, sizeof(T));
  std::memcpy(&value, ExchangeWords(words)[lane], sizeof(T));
  return value;
}

}  // namespace ternion::emulator

inline void __syncthreads() { ternion::emulator::BlockBarrier(); }
inline void __syncwarp(unsigned = ~0u) { ternion::emulator::WarpBarrier(); }

// Of full warps, as everywhere in kernels/cuda.
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return ternion::emulator::ShuffleFrom(value, lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ternion::emulator::ShuffleFrom(value, ternion::emulator::LaneOfThread() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = ternion::emulator::LaneOfThread() - delta;
  return ternion::emulator::ShuffleFrom(value, from >= 0 ? from : from + delta);
}

inline size_t __cvta_generic_to_shared(const void* data) {
  return ternion::emulator::AddressOfShared(data);
}

// One thread of a block runs at a time.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  }
  return c;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// ---- The runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNotReady = 600
};
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum { cudaHostAllocDefault = 0, cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
using cudaStream_t = struct ternion_emulated_stream*;
using cudaEvent_t = struct ternion_emulated_event*;
using cudaGraph_t = struct ternion_emulated_graph*;
using cudaGraphExec_t = struct ternion_emulated_graph*;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
  int multiProcessorCount;
  size_t totalGlobalMem;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);  // there is none
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device);
cudaError_t cudaMalloc(void** data, size_t bytes);
cudaError_t cudaFree(void* data);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* data);
cudaError_t cudaMemset(void* data, int value, size_t bytes);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
// Events know of work that others do on the stream (AddToStream), not of kernels and copies.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, uint64_t flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

namespace ternion::emulator {

cudaError_t Launch(const cudaLaunchConfig_t& config, std::function<void()> thread);
// Whether a kernel's argument holds an address that no device reaches.
void CheckBytes(const void* argument, size_t bytes);
template <typename T>
void CheckArgument(T argument) {
  __builtin_clear_padding(&argument);  // where old pointers may lie
  CheckBytes(&argument, sizeof(argument));
}

}  // namespace ternion::emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  std::apply([](const auto&... v) { (ternion::emulator::CheckArgument(v), ...); }, values);
  return ternion::emulator::Launch(*config, [=] { std::apply(kernel, values); });
}
