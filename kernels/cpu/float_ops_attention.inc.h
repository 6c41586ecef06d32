// Attention over paged keys and values.
//
// A task is one row and one KV head. It walks the row's pages in order with a running softmax: the
// page is the tile, so a result depends on the position alone. All query heads of the KV head pass
// over a page while it is in cache, four at a time over the same registers of keys and values.
#pragma once

#include "kernels/cpu/float_ops_common.inc.h"

namespace ternion::kernels {
namespace {

// Sums held in registers at once: G query heads times kSumTile / G vectors.
#if defined(__AVX512F__)
constexpr int kSumTile = 16;
#else
constexpr int kSumTile = 4;
#endif

// One KV head's share of a page, and how many of its tokens the row may see.
struct PageView {
  const uint16_t* keys;    // [head_dim, kPageTokens]
  const uint16_t* values;  // [kPageTokens, head_dim]
  int count;               // 1 .. kPageTokens
  int head_dim;
};

// The running softmax of the query heads of one task, in the thread's scratch.
struct SoftmaxState {
  float* largest;  // [heads] largest score so far
  float* sums;     // [heads, kLanes] weights so far, added over lanes at the end
  float* outs;     // [heads, padded_dim] weighted values so far
  float* weights;  // [heads of a group, kPageTokens] scores, then weights, of the current page
  int64_t padded_dim;
};

// scores[g][16 t + l] = sum over d of q[g][d] * keys[d][16 t + l], for T vectors of tokens.
template <int G, int T>
inline void ScoreTile(const float* q, const uint16_t* keys, int head_dim, float scale,
                      float* scores) {
  F32x16 sums[G][T];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[g][t] = Zero();
  }
  for (int d = 0; d < head_dim; ++d) {
    F32x16 k[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) k[t] = LoadBf16(keys + d * kPageTokens + t * kLanes);
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      const F32x16 x = Set1(q[g * head_dim + d]);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[g][t] = sums[g][t] + x * k[t];
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      Store(sums[g][t] * Set1(scale), scores + g * kPageTokens + t * kLanes);
    }
  }
}

// Makes weights e^(score - largest) of `count` scores and adds them to the 16 lanes of `sum`.
// Returns the factor (in all lanes) for what was summed before under a smaller maximum.
inline F32x16 UpdateSoftmax(float* scores, int count, float* largest, float* sum) {
  F32x16 top = Set1(*largest);
  ForEachVector(count, [&](int64_t i, int64_t n) {
    top = Max(FirstN(Load(scores + i), n, Set1(-__builtin_inff())), top);
  });
  const F32x16 now = Set1(MaxLane(top));
  const F32x16 factor = Exp(Set1(*largest) - now);
  F32x16 total = Load(sum) * factor;
  ForEachVector(count, [&](int64_t i, int64_t n) {
    const F32x16 weight = FirstN(Exp(Load(scores + i) - now), n, Zero());
    total = total + weight;
    Store(weight, scores + i);
  });
  *largest = MaxLane(now);
  Store(total, sum);
  return factor;
}

// outs[g] = outs[g] * factors[g] + sum over tokens of weights[g][token] * values[token], for T
// vectors of the head; with T = 1, the vector's first n elements.
template <int G, int T>
inline void ValueTile(const float* weights, const PageView& page, int64_t begin, int64_t n,
                      const F32x16* factors, float* outs, int64_t padded_dim) {
  F32x16 sums[G][T];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      sums[g][t] = Load(outs + g * padded_dim + begin + t * kLanes) * factors[g];
    }
  }
  for (int token = 0; token < page.count; ++token) {
    const uint16_t* values = page.values + int64_t{token} * page.head_dim + begin;
    F32x16 v[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      v[t] = T == 1 ? LoadBf16N(values, n) : LoadBf16(values + t * kLanes);
    }
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      const F32x16 w = Set1(weights[g * kPageTokens + token]);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[g][t] = sums[g][t] + w * v[t];
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) Store(sums[g][t], outs + g * padded_dim + begin + t * kLanes);
  }
}

// One page for query heads first .. first + G - 1 of the task.
template <int G>
inline void AttendPage(const float* q, const PageView& page, float scale, const SoftmaxState& state,
                       int first) {
  constexpr int kTile = kSumTile / G < 8 ? kSumTile / G : 8;
  const float* queries = q + int64_t{first} * page.head_dim;
  int token = 0;
  for (; token + kTile * kLanes <= page.count; token += kTile * kLanes) {
    ScoreTile<G, kTile>(queries, page.keys + token, page.head_dim, scale, state.weights + token);
  }
  for (; token < page.count; token += kLanes) {
    ScoreTile<G, 1>(queries, page.keys + token, page.head_dim, scale, state.weights + token);
  }
  F32x16 factors[G];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
    factors[g] = UpdateSoftmax(state.weights + g * kPageTokens, page.count,
                               state.largest + first + g, state.sums + (first + g) * kLanes);
  }
  float* outs = state.outs + first * state.padded_dim;
  int64_t d = 0;
  for (; d + kTile * kLanes <= page.head_dim; d += kTile * kLanes) {
    ValueTile<G, kTile>(state.weights, page, d, kLanes, factors, outs, state.padded_dim);
  }
  for (; d < page.head_dim; d += kLanes) {
    const int64_t n = page.head_dim - d < kLanes ? page.head_dim - d : kLanes;
    ValueTile<G, 1>(state.weights, page, d, n, factors, outs, state.padded_dim);
  }
}

inline SoftmaxState EmptyState(uint8_t* scratch, int heads, int head_dim) {
  SoftmaxState state;
  state.padded_dim = base::RoundUp(head_dim, kLanes);
  state.weights = reinterpret_cast<float*>(scratch);
  state.sums = state.weights + 4 * kPageTokens;
  state.outs = state.sums + heads * kLanes;
  state.largest = state.outs + heads * state.padded_dim;
  std::memset(state.sums, 0, static_cast<size_t>(state.largest - state.sums) * sizeof(float));
  for (int h = 0; h < heads; ++h) state.largest[h] = -__builtin_inff();
  return state;
}

// One task: the query heads of `kv_head` of one row.
inline void AttendRow(const AttentionArgs& args, int64_t row, int kv_head, uint8_t* scratch) {
  const int heads = args.heads / args.kv_heads;
  const int64_t first_column = int64_t{kv_head} * heads * args.head_dim;
  const float* q = args.q + row * args.q_stride + first_column;
  const SoftmaxState state = EmptyState(scratch, heads, args.head_dim);
  const int num_tokens = args.positions[row] + 1;
  const int64_t page_offset = KvPageElements(kv_head, args.head_dim);
  for (int begin = 0; begin < num_tokens; begin += kPageTokens) {
    const KvPage& page = args.pages[row][begin / kPageTokens];
    const int left = num_tokens - begin;
    const PageView view = {page.keys + page_offset, page.values + page_offset,
                           left < kPageTokens ? left : kPageTokens, args.head_dim};
    int h = 0;
    for (; h + 4 <= heads; h += 4) AttendPage<4>(q, view, args.scale, state, h);
    for (; h + 2 <= heads; h += 2) AttendPage<2>(q, view, args.scale, state, h);
    if (h < heads) AttendPage<1>(q, view, args.scale, state, h);
  }
  float* out = args.out + row * args.out_stride + first_column;
  for (int h = 0; h < heads; ++h) {
    const F32x16 sum = Set1(Sum(Load(state.sums + h * kLanes)));
    ForEachVector(args.head_dim, [&](int64_t i, int64_t n) {
      const float* weighted = state.outs + h * state.padded_dim;
      StoreN(Load(weighted + i) / sum, out + h * args.head_dim + i, n);
    });
  }
}

// Positions cost about as much as the few steps every task needs.
inline int64_t TaskCost(int32_t position) { return int64_t{position} + 16; }

// Tasks in the order of KV heads, then rows (neighbouring rows often share pages), stand on a line,
// each as long as it costs; a thread takes those whose middle lies in its part of the line.
void Attention(const AttentionArgs& args, Executor& executor) {
  int64_t head_cost = 0;
  for (int64_t row = 0; row < args.num_rows; ++row) head_cost += TaskCost(args.positions[row]);
  const auto body = [&](int64_t begin, int64_t end, int thread) {
    int64_t at = 0;
    for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
      for (int64_t row = 0; row < args.num_rows; ++row) {
        const int64_t cost = TaskCost(args.positions[row]);
        const int64_t middle = at + cost / 2;
        at += cost;
        if (middle < begin || middle >= end) continue;
        AttendRow(args, row, kv_head, executor.threads->scratch(thread));
      }
    }
  };
  const int64_t work = int64_t{2} * args.head_dim * args.heads / args.kv_heads;  // per position
  executor.threads->ParallelFor(head_cost * args.kv_heads, MinUnits(work), body);
}

}  // namespace
}  // namespace ternion::kernels
