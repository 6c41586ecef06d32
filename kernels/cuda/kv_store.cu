// Writing keys and values into the pages of the KV cache.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kv_page.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

// Writes code(element) of one head, by the block; returns what one step is worth.
template <int kBits, typename F>
__device__ inline float QuantizeHead(const float* x, int head_dim, F write) {
  constexpr bool kMidRise = kBits < 8;
  constexpr float kLevels = kMidRise ? 1 << (kBits - 1) : 127;
  float largest = 1e-5f;
  ForEach(head_dim, [&](int64_t d) { largest = Max(fabsf(x[d]), largest); });
  const float absmax = BlockReduce(largest, [](float a, float b) { return Max(a, b); });
  const float scale = kLevels / absmax;
  ForEach(head_dim, [&](int64_t d) {
    const float scaled = x[d] * scale;
    const float code = kMidRise ? Floor(Min(Max(scaled, -kLevels), kLevels - 1)) + kLevels
                                : RoundWithin(scaled, -kLevels, kLevels);
    write(static_cast<int>(d), static_cast<int>(code));
  });
  return absmax / kLevels;
}

// One vector of a row: the keys of a KV head, or its values.
template <KvFormat kFormat>
__device__ inline void StoreVector(const KvStoreArgs& args, int64_t row, int vector) {
  using Layout = PageLayout<kFormat>;
  const bool is_key = vector < args.kv_heads;
  const int kv_head = is_key ? vector : vector - args.kv_heads;
  const int position = args.positions[row], slot = position % kPageTokens;
  const int head_dim = args.head_dim;
  const KvPage& page = args.pages[row][position / kPageTokens];
  const HeadPage share = ShareOf<kFormat>(page, kv_head, head_dim);
  const float* x = (is_key ? args.k : args.v) + row * args.stride + int64_t{kv_head} * head_dim;
  uint8_t* const data = is_key ? share.keys : share.values;
  const auto index = [=](int64_t d) {
    return is_key ? d * kPageTokens + slot : int64_t{slot} * head_dim + d;
  };
  if constexpr (kFormat == KvFormat::kBf16) {
    ForEach(head_dim,
            [&](int64_t d) { reinterpret_cast<uint16_t*>(data)[index(d)] = ToBf16(x[d]); });
  } else {
    float* const scale = (is_key ? share.key_scales : share.value_scales) + slot;
    if (position == 0) {
      uint16_t* first = page.first + int64_t{vector} * head_dim;
      ForEach(head_dim, [&](int64_t d) { first[d] = ToBf16(x[d]); });
      if (threadIdx.x == 0) *scale = 0;
      return;
    }
    const float step = QuantizeHead<Layout::kBits>(x, head_dim, [&](int d, int code) {
      if constexpr (!Layout::kPacked) {
        data[index(d)] = static_cast<uint8_t>(code);
      } else if (is_key) {
        SetCode<Layout::kBits>(data + Layout::KeyWord(d, slot), Layout::KeyField(slot), code);
      } else {
        SetCode<Layout::kBits>(data + Layout::ValueWord(d, slot), Layout::ValueField(slot), code);
      }
    });
    if (threadIdx.x == 0) *scale = step;
  }
}

// A block per vector and row; where tokens share words, a block per vector takes all rows.
template <KvFormat kFormat>
__global__ void KvStoreKernel(KvStoreArgs args) {
  AwaitOpsBefore();
  for (int64_t row = blockIdx.y; row < args.num_rows; row += gridDim.y) {
    StoreVector<kFormat>(args, row, blockIdx.x);
    __syncthreads();
  }
}

template <KvFormat kFormat>
void KvStoreAs(const KvStoreArgs& args, Executor& executor) {
  const int64_t rows = PageLayout<kFormat>::kPacked ? 1 : args.num_rows;
  const unsigned blocks_of_rows = Blocks(rows < 32768 ? rows : 32768);
  Launch(KvStoreKernel<kFormat>,
         dim3(Blocks(int64_t{2} * args.kv_heads), args.num_rows == 0 ? 0 : blocks_of_rows),
         ThreadsFor(args.head_dim, 128), executor, args);
}

}  // namespace

// ---- Launchers

namespace cuda {

void KvStore(const KvStoreArgs& args, Executor& executor) {
  switch (args.format) {
    case KvFormat::kBf16:
      return KvStoreAs<KvFormat::kBf16>(args, executor);
    case KvFormat::kInt8:
      return KvStoreAs<KvFormat::kInt8>(args, executor);
    case KvFormat::kInt4:
      return KvStoreAs<KvFormat::kInt4>(args, executor);
    case KvFormat::kInt3:
      return KvStoreAs<KvFormat::kInt3>(args, executor);
  }
}

}  // namespace cuda
}  // namespace ternion::kernels
