// Ops that walk rows: norms, quantization, activations, copies. A block works on one row.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// Elements of a row that stay in shared memory while a block passes over it several times.
constexpr int kStagedElements = 8192;

// Makes element(i) of the row, i < dim, all threads together, and keeps it with keep(i, element).
// Loads of several elements are under way at once, whatever keep writes to.
template <typename Element, typename Keep>
__device__ inline void TakeRow(int64_t dim, Element element, Keep keep) {
  constexpr int kAtOnce = 8;
  for (int64_t first = threadIdx.x; first < dim; first += int64_t{kAtOnce} * blockDim.x) {
    decltype(element(first)) elements[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = first + int64_t{j} * blockDim.x;
      if (i < dim) elements[j] = element(i);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = first + int64_t{j} * blockDim.x;
      if (i < dim) keep(i, elements[j]);
    }
  }
  __syncthreads();
}

__device__ inline float InverseRms(const float* x, int64_t dim, float eps) {
  const float squares = LaneSum<kRowLanes>(dim, [&](int64_t i) { return x[i] * x[i]; });
  return 1.0f / sqrtf(squares / static_cast<float>(dim) + eps);
}

__global__ void RmsNormKernel(RmsNormArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  __shared__ float stage[kStagedElements];
  const float* x = args.x + row * args.x_stride;
  float* out = args.out + row * args.out_stride;
  if (args.dim <= kStagedElements) {
    const auto element = [&](int64_t i) { return x[i]; };
    TakeRow(args.dim, element, [&](int64_t i, float v) { stage[i] = v; });
    x = stage;
  }
  const float scale = InverseRms(x, args.dim, args.eps);
  TakeRow(
      args.dim, [&](int64_t i) { return x[i] * scale * args.weight[i]; },
      [&](int64_t i, float value) { out[i] = value; });
}

// A row as it is or normalized, computed anew by each pass.
struct RowValues {
  const float* x;
  const float* weight;  // null: as it is
  float inverse_rms;

  __device__ float operator()(int64_t i) const {
    return weight == nullptr ? x[i] : x[i] * inverse_rms * weight[i];
  }
};

// Writes codes code_of(value) and their sum. Pads are zeroed.
template <typename F>
__device__ inline void StoreCodes(const RowValues& values, const QuantizedRows& out, int64_t row,
                                  float* normed, F code_of) {
  int8_t* codes = out.codes + row * out.stride;
  int32_t sum = 0;
  ForEach(out.dim, [&](int64_t i) {
    const float value = values(i);
    const int32_t code = static_cast<int32_t>(code_of(value));
    sum += code;
    codes[i] = static_cast<int8_t>(code);
    if (normed != nullptr) normed[i] = value;
  });
  ForEach(out.stride - out.dim, [&](int64_t i) { codes[out.dim + i] = 0; });
  sum = BlockReduce(sum, [](int32_t a, int32_t b) { return a + b; });
  if (threadIdx.x == 0) out.sums[row] = sum;
}

// A threshold that the k largest magnitudes reach, with all that equal the least of them, and no
// others (1 <= k <= dim); `largest` is no less than any. Floats >= 0 are ordered like their bits:
// these are bisected. A NaN counts as reaching everything.
__device__ inline float TopThreshold(const RowValues& values, int64_t dim, int64_t k,
                                     float largest) {
  uint32_t low = 0;
  float threshold = 0;
  for (uint32_t high = __float_as_uint(largest) + 1; high - low > 1;) {
    const uint32_t middle = low + (high - low) / 2;
    const float candidate = __uint_as_float(middle);
    int32_t reached = 0;
    ForEach(dim, [&](int64_t i) { reached += fabsf(values(i)) < candidate ? 0 : 1; });
    reached = BlockReduce(reached, [](int32_t a, int32_t b) { return a + b; });
    if (reached < k) {
      high = middle;
      continue;
    }
    low = middle;
    threshold = candidate;
    if (reached == k) break;
  }
  return threshold;
}

__device__ inline void QuantizeRow8(const RowValues& values, const QuantizedRows& out, int64_t row,
                                    float* normed, bool top_half) {
  float largest = 1e-5f;
  ForEach(out.dim, [&](int64_t i) { largest = Max(fabsf(values(i)), largest); });
  const float absmax = BlockReduce(largest, [](float a, float b) { return Max(a, b); });
  const float scale = 127.0f / absmax;
  if (threadIdx.x == 0) out.scales[row] = absmax / 127.0f;
  float least = 0;
  if (top_half) least = TopThreshold(values, out.dim, out.dim - out.dim / 2, absmax);
  StoreCodes(values, out, row, normed, [&](float v) {
    return fabsf(v) < least ? 0.0f : RoundWithin(v * scale, -128.0f, 127.0f);
  });
}

__device__ inline void QuantizeRow4(const RowValues& values, const QuantizedRows& out, int64_t row,
                                    float* normed) {
  constexpr float kSqrt7 = 2.6457513f;
  const float sum = LaneSum<kRowLanes>(out.dim, [&](int64_t i) { return fabsf(values(i)); });
  const float mean = sum / static_cast<float>(out.dim);
  const float divisor = mean + 1e-5f;
  if (threadIdx.x == 0) out.scales[row] = mean / kSqrt7;
  StoreCodes(values, out, row, normed,
             [&](float v) { return RoundWithin(kSqrt7 * v / divisor, -8.0f, 7.0f); });
}

// NaN passes through both, so that a broken row shows.
__device__ inline float Silu(float x) { return x / (1.0f + Exp(0.0f - x)); }
// 0 where x <= 0, even if y is NaN there.
__device__ inline float Relu2Times(float x, float y) {
  constexpr float kSmallest = 1.40129846e-45f;
  const float positive = Max(0.0f, x);
  return x < kSmallest ? 0.0f : positive * positive * y;
}

__device__ inline float Joined(Join join, float x, float y) {
  return join == Join::kAdd ? x + y : join == Join::kSiluTimes ? Silu(x) * y : Relu2Times(x, y);
}

// The block's row, joined if it shall be, where all threads may read it.
__device__ inline const float* StagedRow(const QuantizeArgs& args, int64_t row, float* stage) {
  const int64_t dim = args.out.dim, at = row * args.x_stride;
  const bool joins = args.join != Join::kNothing, staged = dim <= kStagedElements;
  const float *const x = args.x + at, *const y = joins ? args.y + at : nullptr;
  float* const joined = joins ? args.joined + at : nullptr;
  if (!joins && !staged) return x;
  struct Pair {
    float x, y;
  };
  TakeRow(
      dim,
      [&](int64_t i) {
        return Pair{x[i], joins ? y[i] : 0.0f};
      },
      [&](int64_t i, const Pair& pair) {
        const float value = joins ? Joined(args.join, pair.x, pair.y) : pair.x;
        if (staged) stage[i] = value;
        if (joins) joined[i] = value;
      });
  return staged ? stage : joined;
}

// The row's norm weights come closer while the op before still runs.
__device__ inline void PrefetchNorm(const QuantizeArgs& args) {
  constexpr int kLine = 128 / sizeof(float);
  if (args.weight == nullptr) return;
  ForEach(base::CeilDiv(args.out.dim, kLine),
          [&](int64_t line) { PrefetchLine(args.weight + line * kLine); });
}

__global__ void QuantizeKernel(QuantizeArgs args) {
  __shared__ float stage[kStagedElements];
  PrefetchNorm(args);
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int64_t dim = args.out.dim;
  const float* const x = StagedRow(args, row, stage);
  RowValues values = {x, args.weight, 0};
  if (args.weight != nullptr) {
    values.inverse_rms = InverseRms(values.x, dim, args.eps);
    if (dim <= kStagedElements) {  // once, in place of the row
      TakeRow(dim, values, [&](int64_t i, float value) { stage[i] = value; });
      values = {stage, nullptr, 0};
    }
  }
  float* normed = args.normed == nullptr ? nullptr : args.normed + row * dim;
  if (args.bits == 4) {
    QuantizeRow4(values, args.out, row, normed);
  } else {
    QuantizeRow8(values, args.out, row, normed, args.top_half);
  }
}

__global__ void EmbedKernel(EmbedArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int64_t dim = args.table.columns;
  const int64_t first = args.ids[row] * dim;
  float* out = args.out + row * dim;
  if (args.table.type == DenseType::kBf16) {
    const uint16_t* in = static_cast<const uint16_t*>(args.table.data) + first;
    ForEach(dim, [&](int64_t i) { out[i] = FromBf16(in[i]); });
  } else {
    const float* in = static_cast<const float*>(args.table.data) + first;
    ForEach(dim, [&](int64_t i) { out[i] = in[i]; });
  }
}

// A block per row and head.
__global__ void RopeKernel(RopeArgs args) {
  AwaitOpsBefore();
  const int head = static_cast<int>(blockIdx.y);
  const bool is_q = head < args.q.heads;
  const RopeHeads heads = is_q ? args.q : args.k;
  const int64_t row = blockIdx.x, half = args.head_dim / 2, table = args.positions[row] * half;
  float* x =
      heads.x + row * heads.stride + int64_t{is_q ? head : head - args.q.heads} * args.head_dim;
  RowValues values = {x, heads.norm, 0};
  if (heads.norm != nullptr) values.inverse_rms = InverseRms(x, args.head_dim, args.eps);
  ForEach(half, [&](int64_t i) {
    const float a = values(i), b = values(half + i);
    const float cosine = args.cos_table[table + i], sine = args.sin_table[table + i];
    x[i] = a * cosine - b * sine;
    x[half + i] = b * cosine + a * sine;
  });
}

// A block per head; pairs at one distance are independent of each other.
__global__ void HadamardKernel(HadamardArgs args) {
  AwaitOpsBefore();
  float* x = args.x + blockIdx.x * args.stride + int64_t{blockIdx.y} * args.head_dim;
  const float scale = 1.0f / sqrtf(static_cast<float>(args.head_dim));
  ForEach(args.head_dim, [&](int64_t i) { x[i] = x[i] * scale; });
  for (int64_t distance = 1; distance < args.head_dim; distance *= 2) {
    __syncthreads();
    ForEach(args.head_dim / 2, [&](int64_t pair) {
      const int64_t i = pair / distance * 2 * distance + pair % distance;
      const float a = x[i], b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    });
  }
}

__global__ void GatherRowsKernel(GatherRowsArgs args) {
  AwaitOpsBefore();
  const QuantizedRows& out = args.out;
  const int64_t row = blockIdx.x;
  const int8_t* in = args.rows[row];
  int8_t* codes = out.codes + row * out.stride;
  int32_t sum = 0;
  ForEach(out.stride, [&](int64_t i) {
    const int8_t code = i < out.dim ? in[i] : int8_t{0};
    sum += code;
    codes[i] = code;
  });
  sum = BlockReduce(sum, [](int32_t a, int32_t b) { return a + b; });
  if (threadIdx.x != 0) return;
  out.sums[row] = sum;
  out.scales[row] = args.scales[row];
}

__global__ void WeightedSumKernel(WeightedSumArgs args) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x;
  const int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (i >= args.dim) return;
  float* out = args.out + row * args.dim + i;
  float sum = args.accumulate ? *out : 0.0f;
  for (int32_t j = args.begin[row]; j < args.begin[row + 1]; ++j) {
    const float term = args.terms[j][i];
    sum = sum + (args.weights == nullptr ? term : args.weights[j] * term);
  }
  *out = sum;
}

__global__ void ZeroKernel(ZeroArgs args) {
  AwaitOpsBefore();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < args.count) args.out[i] = 0;
}

// Blocks of `threads` over rows x elements.
dim3 Grid(int64_t num_rows, int64_t dim, int threads) {
  return dim3(Blocks(num_rows), Blocks(base::CeilDiv(dim, threads)));
}

}  // namespace

// ---- Launchers

namespace cuda {

void RmsNorm(const RmsNormArgs& args, Executor& executor) {
  Launch(RmsNormKernel, Blocks(args.num_rows), ThreadsFor(args.dim), executor, args);
}

void Quantize(const QuantizeArgs& args, Executor& executor) {
  constexpr int kMostThreads = 512;  // decoding has few rows, which are long
  Launch(QuantizeKernel, Blocks(args.out.num_rows), ThreadsFor(args.out.dim, kMostThreads),
         executor, args);
}

void Embed(const EmbedArgs& args, Executor& executor) {
  Launch(EmbedKernel, Blocks(args.num_rows), ThreadsFor(args.table.columns), executor, args);
}

void Rope(const RopeArgs& args, Executor& executor) {
  const dim3 grid(Blocks(args.num_rows), Blocks(args.q.heads + args.k.heads));
  Launch(RopeKernel, grid, ThreadsFor(args.head_dim / 2), executor, args);
}

void Hadamard(const HadamardArgs& args, Executor& executor) {
  const dim3 grid(Blocks(args.num_rows), Blocks(args.heads));
  Launch(HadamardKernel, grid, ThreadsFor(args.head_dim / 2), executor, args);
}

void GatherRows(const GatherRowsArgs& args, Executor& executor) {
  Launch(GatherRowsKernel, Blocks(args.out.num_rows), ThreadsFor(args.out.dim), executor, args);
}

void WeightedSum(const WeightedSumArgs& args, Executor& executor) {
  const int threads = ThreadsFor(args.dim);
  Launch(WeightedSumKernel, Grid(args.num_rows, args.dim, threads), threads, executor, args);
}

void Zero(const ZeroArgs& args, Executor& executor) {
  const int threads = ThreadsFor(args.count);
  Launch(ZeroKernel, Blocks(base::CeilDiv(args.count, threads)), threads, executor, args);
}

}  // namespace cuda
}  // namespace ternion::kernels
