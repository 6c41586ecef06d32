// Attention over the pages of the KV cache, page by page (kernels/kernels.h, AttentionArgs). Where
// rows are few, blocks take a page each, and a second kernel joins what they found.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kv_page.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/variants.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kHeads = 4;        // query heads of a KV head that pass over a page together
constexpr int kMaxElements = 8;  // of a head that one thread can have: head_dim is at most 1024

// The softmax of one query head over some tokens, as one thread has it: elements
// threadIdx.x + n * kPageTokens of the weighted values.
template <int kElements>
struct Softmax {
  float largest = -Infinity();
  float sum = 0;
  float out[kElements] = {};
};

template <int kElements>
__device__ inline void JoinPage(const Softmax<kElements>& page, Softmax<kElements>& all) {
  const float joined = Max(page.largest, all.largest);
  const float before = Exp(all.largest - joined), now = Exp(page.largest - joined);
  all.largest = joined;
  all.sum = all.sum * before + page.sum * now;
#pragma unroll
  for (int n = 0; n < kElements; ++n) all.out[n] = all.out[n] * before + page.out[n] * now;
}

// What a block works on: some query heads of one row over one KV head's share of a page.
struct PageTask {
  HeadPage page;
  int heads = 0;  // at most kHeads
  int head_dim = 0;
  int count = 0;  // of tokens, at most kPageTokens
  float scale = 0;
  const uint16_t* first_key = nullptr;  // [head_dim] of token 0 in place of its codes, or null
  const uint16_t* first_value = nullptr;
};

template <int kElements>
struct BlockMemory {
  // All keys of a bf16 page with 128 elements, or all values; of larger heads, a piece at a time.
  static constexpr int kStageBytes = kElements == 1 ? 32768 : 16384;
  alignas(16) uint8_t stage[kStageBytes];
  float queries[kElements * kPageTokens][kHeads];
  float weights[kPageTokens][kHeads];  // scores, then weights
  float largest[kHeads], sums[kHeads];
};

// Copies what the whole block reads next. Bytes and addresses are multiples of 16.
__device__ inline void Stage(const uint8_t* from, int64_t bytes, uint8_t* stage) {
  __syncthreads();
  ForEach(bytes / 16, [&](int64_t i) { StartCopy<16>(from + 16 * i, stage + 16 * i); });
  EndCopies();
  WaitForCopies<0>();
  __syncthreads();
}

// While keys are read, values come closer.
__device__ inline void Prefetch(const uint8_t* data, int64_t bytes) {
  constexpr int kLine = 128;
  ForEach(base::CeilDiv(bytes, kLine), [&](int64_t i) { PrefetchLine(data + kLine * i); });
}

// Scores of the thread's token.
template <KvFormat kFormat, int kElements>
__device__ inline void ScorePage(const PageTask& task, BlockMemory<kElements>& memory) {
  constexpr int kElementBytes = KvBits(kFormat) * kPageTokens / 8;
  constexpr int kPiece = BlockMemory<kElements>::kStageBytes / kElementBytes;
  const int token = threadIdx.x;
  float scores[kHeads] = {};
  for (int begin = 0; begin < task.head_dim; begin += kPiece) {
    const int piece = task.head_dim - begin < kPiece ? task.head_dim - begin : kPiece;
    Stage(task.page.keys + int64_t{begin} * kElementBytes, int64_t{piece} * kElementBytes,
          memory.stage);
#pragma unroll 8
    for (int d = 0; d < piece; ++d) {
      const float key = KeyAt<kFormat>(memory.stage, d, token);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) scores[h] = scores[h] + memory.queries[begin + d][h] * key;
    }
  }
  if (token >= task.count) return;
  float factor = task.scale;
  if constexpr (kFormat != KvFormat::kBf16) factor = task.page.key_scales[token] * factor;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) memory.weights[token][h] = scores[h] * factor;
}

// In place of the score of token 0's code.
template <int kElements>
__device__ inline void ScoreFirst(const PageTask& task, BlockMemory<kElements>& memory) {
  for (int h = 0; h < task.heads; ++h) {
    const float score = LaneSum<kLanes>(task.head_dim, [&](int64_t d) {
      return memory.queries[d][h] * FromBf16(task.first_key[d]);
    });
    if (threadIdx.x == 0) memory.weights[0][h] = score * task.scale;
  }
}

// Scores become weights, by a warp per head.
template <int kElements>
__device__ inline void WeighPage(int count, BlockMemory<kElements>& memory) {
  const int h = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float top = -Infinity();
  for (int t = lane; t < count; t += kWarp) top = Max(memory.weights[t][h], top);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    top = Max(top, __shfl_xor_sync(kFullWarp, top, distance));
  }
  for (int t = lane; t < count; t += kWarp) {
    memory.weights[t][h] = Exp(memory.weights[t][h] - top);
  }
  __syncwarp();
  float sum = 0;
  if (lane < kLanes) {
    for (int t = lane; t < count; t += kLanes) sum = sum + memory.weights[t][h];
  }
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum = sum + __shfl_xor_sync(kFullWarp, sum, distance);
  }
  if (lane == 0) {
    memory.largest[h] = top;
    memory.sums[h] = sum;
  }
}

// Adds weight * value of tokens `begin` .. `end` - 1 to the thread's n-th element. `values` are
// those from token `begin` on or, where tokens share words, those from the element's block on.
template <KvFormat kFormat, int kElements>
__device__ inline void AddValues(const uint8_t* values, int begin, int end, int head_dim, int n,
                                 const BlockMemory<kElements>& memory,
                                 Softmax<kElements> (&page)[kHeads]) {
  constexpr bool kPacked = PageLayout<kFormat>::kPacked;
  const int d = static_cast<int>(threadIdx.x) + (kPacked ? 0 : n * kPageTokens);
  if (d >= (kPacked ? head_dim - n * kPageTokens : head_dim)) return;
#pragma unroll 8
  for (int t = begin; t < end; ++t) {
    const float value = ValueAt<kFormat>(values, d, kPacked ? t : t - begin, head_dim);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      page[h].out[n] = page[h].out[n] + memory.weights[t][h] * value;
    }
  }
}

// Values of a page, as many as can be staged at a time.
template <KvFormat kFormat, int kElements>
__device__ inline void SumValues(const PageTask& task, BlockMemory<kElements>& memory,
                                 Softmax<kElements> (&page)[kHeads]) {
  using Layout = PageLayout<kFormat>;
  const int head_dim = task.head_dim;
  if constexpr (Layout::kPacked) {
    constexpr int kBlocks = kPageTokens / kWordLanes;  // of as many elements as there are threads
    const int blocks = static_cast<int>(base::CeilDiv(head_dim, kWordLanes));
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      if (n * kBlocks >= blocks) break;
      const int piece = blocks - n * kBlocks < kBlocks ? blocks - n * kBlocks : kBlocks;
      Stage(task.page.values + n * kBlocks * Layout::kValueBlockBytes,
            piece * Layout::kValueBlockBytes, memory.stage);
      AddValues<kFormat>(memory.stage, 0, task.count, head_dim, n, memory, page);
    }
  } else {
    constexpr int kStep = 16 * 8 / Layout::kBits;  // so many tokens are a multiple of 16 bytes
    const int64_t token_bytes = int64_t{head_dim} * Layout::kBits / 8;
    const int64_t fit = BlockMemory<kElements>::kStageBytes / token_bytes / kStep * kStep;
    const int most = fit < kPageTokens ? static_cast<int>(fit) : kPageTokens;
    for (int begin = 0; begin < task.count; begin += most) {
      const int end = task.count - begin < most ? task.count : begin + most;
      Stage(task.page.values + begin * token_bytes, base::RoundUp(end - begin, kStep) * token_bytes,
            memory.stage);
#pragma unroll
      for (int n = 0; n < kElements; ++n) {
        AddValues<kFormat>(memory.stage, begin, end, head_dim, n, memory, page);
      }
    }
  }
}

// The softmax of one page alone; its queries are in memory.
template <KvFormat kFormat, int kElements>
__device__ inline void AttendPage(const PageTask& task, BlockMemory<kElements>& memory,
                                  Softmax<kElements> (&page)[kHeads]) {
  const int token = threadIdx.x;
  Prefetch(task.page.values, PageLayout<kFormat>::ValuesBytes(task.head_dim));
  ScorePage<kFormat>(task, memory);
  if (task.first_key != nullptr) ScoreFirst(task, memory);
  __syncthreads();
  WeighPage(task.count, memory);
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    page[h].largest = memory.largest[h];
    page[h].sum = memory.sums[h];
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      const int d = token + n * kPageTokens;
      const bool counts = task.first_value != nullptr && d < task.head_dim;
      page[h].out[n] = counts ? memory.weights[0][h] * FromBf16(task.first_value[d]) : 0.0f;
    }
  }
  if constexpr (kFormat != KvFormat::kBf16) {
    __syncthreads();
    if (token < task.count) {
      const float scale = task.page.value_scales[token];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) memory.weights[token][h] = memory.weights[token][h] * scale;
    }
  }
  SumValues<kFormat>(task, memory, page);
}

// Query heads of one row that a block takes together.
template <int kElements>
__device__ inline void LoadQueries(const float* q, int heads, int head_dim,
                                   BlockMemory<kElements>& memory) {
  __syncthreads();
  ForEach(head_dim, [&](int64_t d) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) memory.queries[d][h] = h < heads ? q[h * head_dim + d] : 0.0f;
  });
}

template <KvFormat kFormat>
__device__ inline PageTask TaskOf(const AttentionArgs& args, int64_t row, int kv_head, int page) {
  const KvPage& table = args.pages[row][page];
  PageTask task = {ShareOf<kFormat>(table, kv_head, args.head_dim)};
  task.head_dim = args.head_dim;
  task.scale = args.scale;
  const int left = args.positions[row] + 1 - page * kPageTokens;
  task.count = left < kPageTokens ? left : kPageTokens;
  if (kFormat != KvFormat::kBf16 && page == 0) {
    task.first_key = table.first + int64_t{kv_head} * args.head_dim;
    task.first_value = task.first_key + int64_t{args.kv_heads} * args.head_dim;
  }
  return task;
}

// Where the softmax of a page alone waits to be joined: its largest score, its sum, its values.
constexpr int64_t PartFloats(int head_dim) { return 2 + int64_t{head_dim}; }
struct Parts {
  float* data;  // [rows, heads, pages, PartFloats(head_dim)]
  int64_t pages;
};
__device__ inline float* PartOf(const AttentionArgs& args, const Parts& parts, int64_t row,
                                int64_t head, int64_t page) {
  return parts.data + ((row * args.heads + head) * parts.pages + page) * PartFloats(args.head_dim);
}

// Of the query heads of a KV head, groups that pass over a page together.
__host__ __device__ inline int HeadGroups(const AttentionArgs& args) {
  return static_cast<int>(base::CeilDiv(args.heads / args.kv_heads, kHeads));
}

// A block, of a thread per token of a page, per row and group of heads; it walks all pages, or with
// kSplit takes one.
template <KvFormat kFormat, int kElements, bool kSplit>
__global__ void __launch_bounds__(kPageTokens, kElements == 1 ? 4 : 3)
    AttentionKernel(AttentionArgs args, Parts parts) {
  AwaitOpsBefore();
  __shared__ BlockMemory<kElements> memory;
  const int64_t row = blockIdx.x;
  const int groups = HeadGroups(args), head_dim = args.head_dim;
  const int kv_head = blockIdx.y / groups, begin = static_cast<int>(blockIdx.y) % groups * kHeads;
  const int pages = args.positions[row] / kPageTokens + 1;
  const int first_page = kSplit ? blockIdx.z : 0, end_page = kSplit ? first_page + 1 : pages;
  if (first_page >= pages) return;
  const int heads_of_kv = args.heads / args.kv_heads;
  const int heads = heads_of_kv - begin < kHeads ? heads_of_kv - begin : kHeads;
  const int64_t first_head = int64_t{kv_head} * heads_of_kv + begin;
  LoadQueries(args.q + row * args.q_stride + first_head * head_dim, heads, head_dim, memory);
  Softmax<kElements> all[kHeads];
  for (int p = first_page; p < end_page; ++p) {
    PageTask task = TaskOf<kFormat>(args, row, kv_head, p);
    task.heads = heads;
    Softmax<kElements> page[kHeads];
    AttendPage<kFormat>(task, memory, page);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if constexpr (kSplit) {
        all[h] = page[h];
      } else {
        JoinPage(page[h], all[h]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads) break;
    float* part = PartOf(args, parts, row, first_head + h, first_page);
    if (kSplit && threadIdx.x == 0) part[0] = all[h].largest, part[1] = all[h].sum;
    float* out = args.out + row * args.out_stride + (first_head + h) * head_dim;
#pragma unroll
    for (int n = 0; n < kElements; ++n) {
      const int d = static_cast<int>(threadIdx.x) + n * kPageTokens;
      if (d >= head_dim) break;
      if constexpr (kSplit) {
        part[2 + d] = all[h].out[n];
      } else {
        out[d] = all[h].out[n] / all[h].sum;
      }
    }
  }
}

// A block per row and query head.
__global__ void JoinPagesKernel(AttentionArgs args, Parts parts) {
  AwaitOpsBefore();
  const int64_t row = blockIdx.x, head = blockIdx.y;
  const int pages = args.positions[row] / kPageTokens + 1;
  float* out = args.out + row * args.out_stride + head * args.head_dim;
  ForEach(args.head_dim, [&](int64_t d) {
    Softmax<1> all;
#pragma unroll 4
    for (int p = 0; p < pages; ++p) {
      const float* part = PartOf(args, parts, row, head, p);
      JoinPage({part[0], part[1], {part[2 + d]}}, all);
    }
    out[d] = all.out[0] / all.sum;
  });
}

// ---- Launching

// With more blocks than this, a device is busy without taking pages apart.
constexpr int64_t kManyBlocks = 512;

// How many rows' pages can be taken apart at once; 0: blocks shall walk the pages of their rows.
int64_t RowsToSplit(const AttentionArgs& args, int64_t pages, const Executor& executor) {
  const int64_t blocks = args.num_rows * args.kv_heads * HeadGroups(args);
  if (pages <= 1 || pages > 65535 || blocks >= kManyBlocks) return 0;
  const int64_t row_bytes =
      args.heads * pages * PartFloats(args.head_dim) * static_cast<int64_t>(sizeof(float));
  return static_cast<int64_t>(executor.scratch.size()) / row_bytes;
}

template <KvFormat kFormat, int kElements>
void AttentionOver(AttentionArgs args, Executor& executor) {
  const unsigned groups = Blocks(int64_t{args.kv_heads} * HeadGroups(args));
  const int64_t pages = base::CeilDiv(args.max_tokens, kPageTokens);
  const int64_t at_once = RowsToSplit(args, pages, executor);
  if (at_once == 0) {
    return Launch(AttentionKernel<kFormat, kElements, false>, dim3(Blocks(args.num_rows), groups),
                  kPageTokens, executor, args, Parts{nullptr, pages});
  }
  const Parts parts = {reinterpret_cast<float*>(executor.scratch.data()), pages};
  for (int64_t left = args.num_rows; left > 0; left -= at_once) {
    args.num_rows = left < at_once ? left : at_once;
    const unsigned rows = Blocks(args.num_rows);
    Launch(AttentionKernel<kFormat, kElements, true>, dim3(rows, groups, Blocks(pages)),
           kPageTokens, executor, args, parts);
    Launch(JoinPagesKernel, dim3(rows, Blocks(args.heads)), ThreadsFor(args.head_dim, kPageTokens),
           executor, args, parts);
    args.q += at_once * args.q_stride;
    args.pages += at_once;
    args.positions += at_once;
    args.out += at_once * args.out_stride;
  }
}

template <KvFormat kFormat>
void AttentionAs(const AttentionArgs& args, Executor& executor) {
  if (args.head_dim <= kPageTokens) return AttentionOver<kFormat, 1>(args, executor);
  AttentionOver<kFormat, kMaxElements>(args, executor);
}

}  // namespace

// ---- Launchers

namespace cuda {

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
