// From the gate's choice to rows by expert, and back.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// The sum of the values of the threads before this one; `total` is that of all.
__device__ inline int32_t BlockScan(int32_t value, int32_t* total) {
  __shared__ int32_t of_warps[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t sum = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += before;
  }
  __syncthreads();  // nobody still reads what an earlier call left
  if (lane == kWarp - 1) of_warps[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  *total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w < warp) before += of_warps[w];
    *total += of_warps[w];
  }
  return before + sum - value;
}

// One block. A thread takes an expert and walks all routes, which all threads read together.
__global__ void GroupRoutesKernel(GroupRoutesArgs args) {
  AwaitOpsBefore();
  const int32_t num_routes = static_cast<int32_t>(args.num_routes);
  int32_t first = 0, num_used = 0;
  for (int base = 0; base < args.num_experts; base += static_cast<int>(blockDim.x)) {
    const int expert = base + static_cast<int>(threadIdx.x);
    const bool inside = expert < args.num_experts;
    int32_t count = 0;
    for (int32_t r = 0; inside && r < num_routes; ++r) count += args.experts[r] == expert;
    int32_t total;
    int32_t place = first + BlockScan(count, &total);
    first += total;
    const int32_t place_in_used = num_used + BlockScan(count > 0, &total);
    num_used += total;
    if (!inside) continue;
    if (count > 0) args.used[place_in_used] = expert;
    args.begin[expert] = place;
    for (int32_t r = 0; count > 0; ++r) {
      if (args.experts[r] != expert) continue;
      args.order[place] = r;
      args.places[r] = place++;
      --count;
    }
  }
  if (threadIdx.x == 0) args.begin[args.num_experts] = num_routes;
  ForEach(args.num_experts - num_used, [&](int64_t i) { args.used[num_used + i] = -1; });
}

constexpr int kMaxTopK = 64;

__global__ void SumRoutesKernel(SumRoutesArgs args) {
  AwaitOpsBefore();
  // Places ascend with experts.
  __shared__ int32_t places[kMaxTopK];
  __shared__ float weights[kMaxTopK];
  const int64_t row = blockIdx.x;
  const int32_t* unsorted = args.places + row * args.k;
  ForEach(args.k, [&](int64_t j) {
    int rank = 0;
    for (int i = 0; i < args.k; ++i) rank += unsorted[i] < unsorted[j];
    places[rank] = unsorted[j];
    weights[rank] = args.weights[row * args.k + j];
  });
  __syncthreads();
  const int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (i >= args.dim) return;
  float* out = args.out + row * args.dim + i;
  float sum = args.presum ? 0.0f : *out;
  for (int j = 0; j < args.k; ++j) sum = sum + weights[j] * args.y[places[j] * args.dim + i];
  *out = args.presum ? *out + sum : sum;
}

}  // namespace

// ---- Launchers

namespace cuda {

void GroupRoutes(const GroupRoutesArgs& args, Executor& executor) {
  Launch(GroupRoutesKernel, 1, ThreadsFor(args.num_experts, 1024), executor, args);
}

void SumRoutes(const SumRoutesArgs& args, Executor& executor) {
  const int threads = ThreadsFor(args.dim);
  const dim3 grid(Blocks(args.num_rows), Blocks(base::CeilDiv(args.dim, threads)));
  Launch(SumRoutesKernel, grid, threads, executor, args);
}

}  // namespace cuda
}  // namespace ternion::kernels
