// What went wrong with calls that return at once. CUDA tells a launch that it refuses (no code for
// the device, too few resources) to its caller alone, not to whoever waits for the stream.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace ternion::kernels::cuda {

inline std::atomic<cudaError_t> first_error{cudaSuccess};

// From any thread.
inline void Note(cudaError_t error) {
  cudaError_t none = cudaSuccess;
  if (error != cudaSuccess) first_error.compare_exchange_strong(none, error);
}

}  // namespace ternion::kernels::cuda
