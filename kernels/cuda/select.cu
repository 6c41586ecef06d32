// The CUDA table, and setting up a device for it.
#include <cuda_runtime.h>

#include "kernels/cuda/errors.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/variants.h"
#include "kernels/select.h"

namespace ternion::kernels {
namespace {

const char* ErrorOf(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* Wait(Executor& executor) {
  cuda::Note(cudaStreamSynchronize(static_cast<cudaStream_t>(executor.stream)));
  return ErrorOf(cuda::first_error);
}

void Copy(const CopyArgs& args, Executor& executor) {
  cuda::Note(cudaMemcpyAsync(args.to, args.from, args.bytes, cudaMemcpyDefault,
                             static_cast<cudaStream_t>(executor.stream)));
}

Recording Record(const std::function<void()>& calls, Executor& executor) {
  const cudaStream_t stream = static_cast<cudaStream_t>(executor.stream);
  if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess) {
    return nullptr;
  }
  calls();
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(stream, &graph) != cudaSuccess) return nullptr;
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  if (error != cudaSuccess) return nullptr;
  return {executable, [](cudaGraphExec_t graph) { cudaGraphExecDestroy(graph); }};
}

void Replay(const Recording& recording, Executor& executor) {
  cuda::Note(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording.get()),
                             static_cast<cudaStream_t>(executor.stream)));
}

constexpr Kernels kTable = {
    .name = "cuda",
    .layout = TernaryLayout::kTiles,
    .smaller_layout = TernaryLayout::kTilesBase3,
    .wait = Wait,
    .rms_norm = cuda::RmsNorm,
    .quantize = cuda::Quantize,
    .ternary_matmul = cuda::TernaryMatmul,
    .dense_matmul = cuda::DenseMatmul,
    .embed = cuda::Embed,
    .rope = cuda::Rope,
    .hadamard = cuda::Hadamard,
    .kv_store = cuda::KvStore,
    .attention = cuda::Attention,
    .gate_top_k = cuda::GateTopK,
    .gather_rows = cuda::GatherRows,
    .encode_rows = cuda::EncodeRows,
    .decode_rows = cuda::DecodeRows,
    .add_rows = cuda::AddRows,
    .pack_codes = cuda::PackCodes,
    .unpack_int4 = cuda::UnpackInt4,
    .sample = cuda::Sample,
    .draw_ternary = cuda::DrawTernary,
    .weighted_sum = cuda::WeightedSum,
    .zero = cuda::Zero,
    .copy = Copy,
    .group_routes = cuda::GroupRoutes,
    .expert_matmul = cuda::ExpertMatmul,
    .sum_routes = cuda::SumRoutes,
    .record = Record,
    .replay = Replay,
};

// Attention wants most: a row's pages side by side, up to some 700,000 tokens of 20 heads.
constexpr size_t kScratchBytes = size_t{64} << 20;

const Kernels* Refuse(std::string reason, std::string* why) {
  *why = std::move(reason);
  return nullptr;
}

}  // namespace

const Kernels* SelectCudaKernels(int device, Executor& executor, std::string* why) {
  int count = 0;
  if (const char* error = ErrorOf(cudaGetDeviceCount(&count))) {
    return Refuse(std::string("no usable device: ") + error, why);
  }
  if (count == 0) return Refuse("no device found", why);
  const int ordinal = device % count;  // ranks of a node share devices when there are too few
  cudaDeviceProp properties;
  cudaStream_t stream;
  cudaError_t error = cudaSetDevice(ordinal);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, ordinal);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) {
    return Refuse("device " + std::to_string(ordinal) + ": " + cudaGetErrorString(error), why);
  }
  // As long as the process, like the device itself.
  executor.stream = stream;
  executor.memory = new DeviceMemory(ordinal, properties.totalGlobalMem, count);
  executor.staging = new StagingMemory;
  executor.scratch = {executor.memory->Allocate(kScratchBytes), kScratchBytes};
  cuda::Zero({.out = reinterpret_cast<float*>(executor.scratch.data()), .count = 1}, executor);
  if (const char* error = Wait(executor)) {
    return Refuse("device " + std::to_string(ordinal) + " runs no kernel of this build: " + error,
                  why);
  }
  return &kTable;
}

}  // namespace ternion::kernels
