// Writing keys and values into the pages of the KV cache (kernels/kv_page.h), and attention over
// them.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

constexpr int kWordCodes = 8;   // codes of a word, below 8 bits
constexpr int kWordLanes = 16;  // words side by side

// ---- Where codes lie

// Of one KV head's keys or values in a page.
template <KvFormat kFormat>
struct PageLayout {
  static constexpr int kBits = KvBits(kFormat);
  static constexpr bool kPacked = kBits < 8;
  static constexpr int64_t kWordsBytes = int64_t{kWordLanes} * kBits;
  static constexpr int64_t kValueBlockBytes = kPageTokens / kWordCodes * kWordsBytes;

  static __device__ int64_t KeysBytes(int head_dim) {
    return int64_t{kBits} * head_dim * kPageTokens / 8;
  }
  static __device__ int64_t ValuesBytes(int head_dim) {
    return kPacked ? base::CeilDiv(head_dim, kWordLanes) * kValueBlockBytes : KeysBytes(head_dim);
  }
  // First byte of the word that holds a code, which is its `KeyField`-th or `ValueField`-th.
  static __device__ int64_t KeyWord(int d, int token) {
    return d * kWordsBytes + token % kWordLanes * kBits;
  }
  static __device__ int KeyField(int token) { return token / kWordLanes; }
  static __device__ int64_t ValueWord(int d, int token) {
    return d / kWordLanes * kValueBlockBytes + token / kWordCodes * kWordsBytes +
           d % kWordLanes * kBits;
  }
  static __device__ int ValueField(int token) { return token % kWordCodes; }
};

// A code of kBits as code - 2^(kBits - 1) + 0.5.
template <int kBits>
__device__ inline float CodeAt(const uint8_t* word, int field) {
  const int bit = field * kBits;
  uint32_t bits = word[bit / 8];
  if (bit % 8 + kBits > 8) bits |= uint32_t{word[bit / 8 + 1]} << 8;
  const int code = static_cast<int>(bits >> bit % 8 & ((1 << kBits) - 1));
  return static_cast<float>(code) + (0.5f - (1 << (kBits - 1)));
}

template <int kBits>
__device__ inline void SetCode(uint8_t* word, int field, int code) {
  const int bit = field * kBits;
  uint8_t* byte = word + bit / 8;
  const int mask = ((1 << kBits) - 1) << bit % 8;
  const int bits = code << bit % 8;
  byte[0] = static_cast<uint8_t>((byte[0] & ~mask) | bits);
  if (mask > 255) byte[1] = static_cast<uint8_t>((byte[1] & ~(mask >> 8)) | bits >> 8);
}

// One KV head's share of a page.
struct HeadPage {
  uint8_t* keys;
  uint8_t* values;
  float* key_scales;    // [kPageTokens], null at bf16
  float* value_scales;  // [kPageTokens], null at bf16
};
template <KvFormat kFormat>
__device__ inline HeadPage ShareOf(const KvPage& page, int kv_head, int head_dim) {
  using Layout = PageLayout<kFormat>;
  const int64_t scales = int64_t{kv_head} * kPageTokens;
  const bool scaled = kFormat != KvFormat::kBf16;
  return {static_cast<uint8_t*>(page.keys) + kv_head * Layout::KeysBytes(head_dim),
          static_cast<uint8_t*>(page.values) + kv_head * Layout::ValuesBytes(head_dim),
          scaled ? page.key_scales + scales : nullptr,
          scaled ? page.value_scales + scales : nullptr};
}

template <KvFormat kFormat>
__device__ inline float KeyAt(const HeadPage& page, int d, int token) {
  using Layout = PageLayout<kFormat>;
  const int64_t index = int64_t{d} * kPageTokens + token;
  if constexpr (kFormat == KvFormat::kBf16) {
    return FromBf16(reinterpret_cast<const uint16_t*>(page.keys)[index]);
  } else if constexpr (kFormat == KvFormat::kInt8) {
    return static_cast<float>(reinterpret_cast<const int8_t*>(page.keys)[index]);
  } else {
    return CodeAt<Layout::kBits>(page.keys + Layout::KeyWord(d, token), Layout::KeyField(token));
  }
}
template <KvFormat kFormat>
__device__ inline float ValueAt(const HeadPage& page, int d, int token, int head_dim) {
  using Layout = PageLayout<kFormat>;
  const int64_t index = int64_t{token} * head_dim + d;
  if constexpr (kFormat == KvFormat::kBf16) {
    return FromBf16(reinterpret_cast<const uint16_t*>(page.values)[index]);
  } else if constexpr (kFormat == KvFormat::kInt8) {
    return static_cast<float>(reinterpret_cast<const int8_t*>(page.values)[index]);
  } else {
    return CodeAt<Layout::kBits>(page.values + Layout::ValueWord(d, token),
                                 Layout::ValueField(token));
  }
}

// ---- CUDA kernels: writing

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

// ---- CUDA kernels: attention

constexpr int kHeads = 4;        // query heads of a KV head that pass over a page together
constexpr int kMaxElements = 8;  // of a head that one thread can have: head_dim is at most 1024

// The running softmax of kHeads query heads. Shared by the block but for `outs`, of which a thread
// has elements threadIdx.x + n * kPageTokens.
struct SoftmaxState {
  float weights[kHeads][kPageTokens];  // scores, then weights, of the current page
  float lanes[kHeads][kLanes];         // weights so far, added over lanes at the end
  float largest[kHeads];               // largest score so far
  float factor[kHeads];                // for what was summed under a smaller maximum
};

// weights[h][token] of `count` tokens become e^(score - largest), and are added to the lanes. By
// one warp per head.
__device__ inline void UpdateSoftmax(SoftmaxState& state, int heads, int count) {
  const int lane = threadIdx.x % kWarp;
  for (int h = threadIdx.x / kWarp; h < heads; h += kPageTokens / kWarp) {
    float* weights = state.weights[h];
    float top = state.largest[h];
    for (int t = lane; t < count; t += kWarp) top = Max(weights[t], top);
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      top = Max(top, __shfl_xor_sync(kFullWarp, top, distance));
    }
    const float factor = Exp(state.largest[h] - top);
    for (int t = lane; t < count; t += kWarp) weights[t] = Exp(weights[t] - top);
    __syncwarp();
    if (lane < kLanes) {
      float sum = state.lanes[h][lane] * factor;
      for (int t = lane; t < count; t += kLanes) sum = sum + weights[t];
      state.lanes[h][lane] = sum;
    }
    if (lane == 0) {
      state.largest[h] = top;
      state.factor[h] = factor;
    }
    __syncwarp();
  }
}

// The softmax of position 0 alone, whose key and value are bf16 below bf16.
template <int kElements>
__device__ inline void AttendFirst(const float* q, const uint16_t* key, const uint16_t* value,
                                   int heads, int head_dim, float scale, SoftmaxState& state,
                                   float (&outs)[kHeads][kElements]) {
  for (int h = 0; h < heads; ++h) {
    const float* query = q + int64_t{h} * head_dim;
    const float score = LaneSum(head_dim, [&](int64_t d) { return query[d] * FromBf16(key[d]); });
    if (threadIdx.x == 0) {
      state.largest[h] = score * scale;
      state.lanes[h][0] = 1.0f;
    }
    for (int n = 0; n < kElements; ++n) {
      const int d = static_cast<int>(threadIdx.x) + n * kPageTokens;
      if (d < head_dim) outs[h][n] = FromBf16(value[d]);
    }
  }
  __syncthreads();
}

// A block of a thread per token of a page, for one row and KV head. Scores are summed over the head
// and values over tokens one after the other.
template <KvFormat kFormat, int kElements>
__global__ void __launch_bounds__(kPageTokens, 4) AttentionKernel(AttentionArgs args) {
  __shared__ SoftmaxState state;
  __shared__ float queries[kHeads][kElements * kPageTokens];
  const int64_t row = blockIdx.x;
  const int kv_head = blockIdx.y, head_dim = args.head_dim;
  const int heads_of_kv = args.heads / args.kv_heads;
  const int num_tokens = args.positions[row] + 1;
  const KvPage* const pages = args.pages[row];
  const int token = threadIdx.x;
  for (int begin = 0; begin < heads_of_kv; begin += kHeads) {
    const int heads = heads_of_kv - begin < kHeads ? heads_of_kv - begin : kHeads;
    const int64_t column = (int64_t{kv_head} * heads_of_kv + begin) * head_dim;
    const float* q = args.q + row * args.q_stride + column;
    float outs[kHeads][kElements] = {};
    for (int h = 0; h < heads; ++h) {
      ForEach(head_dim, [&](int64_t d) { queries[h][d] = q[int64_t{h} * head_dim + d]; });
      if (token < kLanes) state.lanes[h][token] = 0;
      if (token == 0) state.largest[h] = -Infinity();
    }
    __syncthreads();
    if constexpr (kFormat != KvFormat::kBf16) {
      const uint16_t* key = pages[0].first + int64_t{kv_head} * head_dim;
      const uint16_t* value = key + int64_t{args.kv_heads} * head_dim;
      AttendFirst(q, key, value, heads, head_dim, args.scale, state, outs);
    }
    for (int first = 0; first < num_tokens; first += kPageTokens) {
      const HeadPage page = ShareOf<kFormat>(pages[first / kPageTokens], kv_head, head_dim);
      const int count = num_tokens - first < kPageTokens ? num_tokens - first : kPageTokens;
      if (token < count) {
        float scores[kHeads] = {};
        for (int d = 0; d < head_dim; ++d) {
          const float key = KeyAt<kFormat>(page, d, token);
#pragma unroll
          for (int h = 0; h < kHeads; ++h) scores[h] = scores[h] + queries[h][d] * key;
        }
        float factor = args.scale;
        if constexpr (kFormat != KvFormat::kBf16) factor = page.key_scales[token] * factor;
        const bool skip = kFormat != KvFormat::kBf16 && first + token == 0;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          state.weights[h][token] = skip ? -Infinity() : scores[h] * factor;
        }
      }
      __syncthreads();
      UpdateSoftmax(state, heads, count);
      __syncthreads();
      if constexpr (kFormat != KvFormat::kBf16) {
        if (token < count) {
          for (int h = 0; h < heads; ++h) {
            state.weights[h][token] = state.weights[h][token] * page.value_scales[token];
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kElements; ++n) {
        const int d = token + n * kPageTokens;
        if (d >= head_dim) break;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) outs[h][n] = outs[h][n] * state.factor[h];
        for (int t = 0; t < count; ++t) {
          const float value = ValueAt<kFormat>(page, d, t, head_dim);
#pragma unroll
          for (int h = 0; h < kHeads; ++h) outs[h][n] = outs[h][n] + state.weights[h][t] * value;
        }
      }
      __syncthreads();
    }
    float* out = args.out + row * args.out_stride + column;
    for (int h = 0; h < heads; ++h) {
      // All threads add alike: lanes pairwise.
      float sums[kLanes];
      for (int l = 0; l < kLanes; ++l) sums[l] = state.lanes[h][l];
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) sums[l] = sums[l] + sums[l + half];
      }
#pragma unroll
      for (int n = 0; n < kElements; ++n) {
        const int d = token + n * kPageTokens;
        if (d < head_dim) out[int64_t{h} * head_dim + d] = outs[h][n] / sums[0];
      }
    }
    __syncthreads();
  }
}

template <KvFormat kFormat>
void AttentionAs(const AttentionArgs& args, Executor& executor) {
  const auto kernel = args.head_dim <= kPageTokens ? AttentionKernel<kFormat, 1>
                                                   : AttentionKernel<kFormat, kMaxElements>;
  Launch(kernel, dim3(Blocks(args.num_rows), Blocks(args.kv_heads)), kPageTokens, executor, args);
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

void Attention(const AttentionArgs& args, Executor& executor) {
  switch (args.format) {
    case KvFormat::kBf16:
      return AttentionAs<KvFormat::kBf16>(args, executor);
    case KvFormat::kInt8:
      return AttentionAs<KvFormat::kInt8>(args, executor);
    case KvFormat::kInt4:
      return AttentionAs<KvFormat::kInt4>(args, executor);
    case KvFormat::kInt3:
      return AttentionAs<KvFormat::kInt3>(args, executor);
  }
}

}  // namespace cuda
}  // namespace ternion::kernels
