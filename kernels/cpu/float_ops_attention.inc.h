// Attention over paged keys and values.
//
// A task is one row and one KV head. It walks the row's pages in order and joins the softmax of
// each with that of those before: the page is the tile, so a result depends on the position alone.
// All query heads of the KV head pass over a page while it is in cache, four at a time over the
// same registers of keys and values. Pages below bf16 differ in how those registers are filled and
// in the scales of their tokens.
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
  const uint8_t* keys;
  const uint8_t* values;
  const float* key_scales;    // [kPageTokens], or null at bf16
  const float* value_scales;  // [kPageTokens], or null at bf16
  const uint16_t* first_key;  // [head_dim] of token 0 in place of its codes, or null
  const uint16_t* first_value;
  int count;  // 1 .. kPageTokens
  int head_dim;
};

template <KvFormat kFormat>
inline PageView ViewPage(const AttentionArgs& args, int64_t row, int kv_head, int begin) {
  const KvPage& page = args.pages[row][begin / kPageTokens];
  const int head_dim = args.head_dim, count = args.positions[row] + 1 - begin;
  const int64_t vector = int64_t{kBitsOf<kFormat>} * head_dim * kPageTokens / 8;
  const int64_t values =
      kPacked<kFormat> ? base::CeilDiv(head_dim, kLanes) * kValueBlockBytes<kFormat> : vector;
  const int64_t scales = int64_t{kv_head} * kPageTokens;
  PageView view = {};
  view.keys = static_cast<const uint8_t*>(page.keys) + kv_head * vector;
  view.values = static_cast<const uint8_t*>(page.values) + kv_head * values;
  if constexpr (kFormat != KvFormat::kBf16) {
    view.key_scales = page.key_scales + scales;
    view.value_scales = page.value_scales + scales;
    if (begin == 0) {
      view.first_key = page.first + int64_t{kv_head} * head_dim;
      view.first_value = view.first_key + int64_t{args.kv_heads} * head_dim;
    }
  }
  view.count = count < kPageTokens ? count : kPageTokens;
  view.head_dim = head_dim;
  return view;
}

// n elements from `index` on, of those that do not lie in words.
template <KvFormat kFormat>
inline F32x16 LoadElements(const uint8_t* data, int64_t index, int64_t n) {
  if constexpr (kFormat == KvFormat::kBf16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(data) + index;
    return n == kLanes ? LoadBf16(p) : LoadBf16N(p, n);
  } else {
    const int8_t* p = reinterpret_cast<const int8_t*>(data) + index;
    return n == kLanes ? LoadI8(p) : LoadI8N(p, n);
  }
}

// The softmax of the query heads of one task over the pages so far, in the thread's scratch.
struct SoftmaxState {
  float* largest;  // [heads, kLanes] largest score so far, in all lanes
  float* sums;     // [heads, kLanes] weights so far, in all lanes
  float* outs;     // [heads, padded_dim] weighted values so far
  float* weights;  // [heads of a group, kPageTokens] scores, then weights, of the current page
  int64_t padded_dim;
};

// scores[g][token + 16 t + l] = scale * sum over d of q[g][d] * keys[d][token + 16 t + l], for T
// vectors of tokens.
template <KvFormat kFormat, int G, int T>
inline void ScoreTile(const float* q, const PageView& page, int token, float scale, float* scores) {
  constexpr int kBits = kBitsOf<kFormat>;
  const int head_dim = page.head_dim;
  F32x16 sums[G][T];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[g][t] = Zero();
  }
  for (int d = 0; d < head_dim; ++d) {
    F32x16 k[T];
    if constexpr (kPacked<kFormat>) {
      const U32x16 words =
          LoadWords<kBits>(page.keys + d * kWordsBytes<kFormat>) >> (token / kLanes * kBits);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) k[t] = CodeValue<kBits>(words >> (t * kBits));
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        k[t] = LoadElements<kFormat>(page.keys, d * kPageTokens + token + t * kLanes, kLanes);
      }
    }
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
      const int at = token + t * kLanes;
      F32x16 factor = Set1(scale);
      if constexpr (kFormat != KvFormat::kBf16) factor = Load(page.key_scales + at) * factor;
      Store(sums[g][t] * factor, scores + g * kPageTokens + at);
    }
  }
}

// How a page joins what was before for one query head; each in all lanes.
struct PageShare {
  F32x16 before, now;  // factors of what was summed before and of what this page sums
  F32x16 first;        // weight of token 0
};

// `count` scores of a page become weights e^(score - the page's largest), and those the page's sum.
inline PageShare UpdateSoftmax(float* scores, int count, float* largest, float* sum) {
  F32x16 top = Set1(-__builtin_inff());
  ForEachVector(count, [&](int64_t i, int64_t n) {
    top = Max(FirstN(Load(scores + i), n, Set1(-__builtin_inff())), top);
  });
  top = Set1(MaxLane(top));
  F32x16 total = Zero();
  ForEachVector(count, [&](int64_t i, int64_t n) {
    const F32x16 weight = FirstN(Exp(Load(scores + i) - top), n, Zero());
    total = total + weight;
    Store(weight, scores + i);
  });
  const F32x16 so_far = Load(largest), joined = Max(top, so_far);
  const PageShare share = {Exp(so_far - joined), Exp(top - joined), Set1(scores[0])};
  Store(joined, largest);
  Store(Load(sum) * share.before + Set1(Sum(total)) * share.now, sum);
  return share;
}

// outs[g] = outs[g] * before + (sum over tokens of weights[g][token] * values[token]) * now, for T
// vectors of the head; with T = 1, the vector's first n elements.
template <KvFormat kFormat, int G, int T>
inline void ValueTile(const float* weights, const PageView& page, int64_t begin, int64_t n,
                      const PageShare* shares, float* outs, int64_t padded_dim) {
  constexpr int kBits = kBitsOf<kFormat>;
  F32x16 sums[G][T];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      sums[g][t] = Zero();
    }
  }
  if (kFormat != KvFormat::kBf16 && page.first_value != nullptr) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const uint16_t* value = page.first_value + begin + t * kLanes;
      const F32x16 v = LoadBf16N(value, T == 1 ? n : kLanes);
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) sums[g][t] = shares[g].first * v;
    }
  }
  U32x16 words[T] = {};
  for (int token = 0; token < page.count; ++token) {
    F32x16 v[T];
    if constexpr (kPacked<kFormat>) {
      if (token % kWordCodes == 0) {
        const uint8_t* group = page.values + begin / kLanes * kValueBlockBytes<kFormat> +
                               token / kWordCodes * kWordsBytes<kFormat>;
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t)
          words[t] = LoadWords<kBits>(group + t * kValueBlockBytes<kFormat>);
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        v[t] = CodeValue<kBits>(words[t]);
        words[t] = words[t] >> kBits;
      }
    } else {
      const int64_t first = int64_t{token} * page.head_dim + begin;
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        v[t] = LoadElements<kFormat>(page.values, first + t * kLanes, T == 1 ? n : kLanes);
      }
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
    for (int t = 0; t < T; ++t) {
      float* out = outs + g * padded_dim + begin + t * kLanes;
      Store(Load(out) * shares[g].before + sums[g][t] * shares[g].now, out);
    }
  }
}

// q . key * scale, in the order of 16 lanes.
inline float ScoreFirst(const float* q, const uint16_t* key, int head_dim, float scale) {
  F32x16 sum = Zero();
  ForEachVector(head_dim,
                [&](int64_t i, int64_t n) { sum = sum + LoadN(q + i, n) * LoadBf16N(key + i, n); });
  return Sum(sum) * scale;
}

// Scores of one query head become weights. Where token 0 is bf16, the scale of its code is 0.
template <KvFormat kFormat>
inline PageShare WeighPage(const PageView& page, const float* q, float scale, float* scores,
                           float* largest, float* sum) {
  if (kFormat != KvFormat::kBf16 && page.first_key != nullptr) {
    scores[0] = ScoreFirst(q, page.first_key, page.head_dim, scale);
  }
  const PageShare share = UpdateSoftmax(scores, page.count, largest, sum);
  if constexpr (kFormat != KvFormat::kBf16) {
    ForEachVector(page.count, [&](int64_t i, int64_t) {
      Store(Load(scores + i) * Load(page.value_scales + i), scores + i);
    });
  }
  return share;
}

// One page for query heads first .. first + G - 1 of the task.
template <KvFormat kFormat, int G>
inline void AttendPage(const float* q, const PageView& page, float scale, const SoftmaxState& state,
                       int first) {
  constexpr int kTile = kSumTile / G < 8 ? kSumTile / G : 8;
  const float* queries = q + int64_t{first} * page.head_dim;
  int token = 0;
  for (; token + kTile * kLanes <= page.count; token += kTile * kLanes) {
    ScoreTile<kFormat, G, kTile>(queries, page, token, scale, state.weights);
  }
  for (; token < page.count; token += kLanes) {
    ScoreTile<kFormat, G, 1>(queries, page, token, scale, state.weights);
  }
  PageShare shares[G];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
    const int at = (first + g) * kLanes;
    shares[g] =
        WeighPage<kFormat>(page, queries + g * page.head_dim, scale,
                           state.weights + g * kPageTokens, state.largest + at, state.sums + at);
  }
  float* outs = state.outs + first * state.padded_dim;
  int64_t d = 0;
  for (; d + kTile * kLanes <= page.head_dim; d += kTile * kLanes) {
    ValueTile<kFormat, G, kTile>(state.weights, page, d, kLanes, shares, outs, state.padded_dim);
  }
  for (; d < page.head_dim; d += kLanes) {
    const int64_t n = page.head_dim - d < kLanes ? page.head_dim - d : kLanes;
    ValueTile<kFormat, G, 1>(state.weights, page, d, n, shares, outs, state.padded_dim);
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
  for (int i = 0; i < heads * kLanes; ++i) state.largest[i] = -__builtin_inff();
  return state;
}

// One task: the query heads of `kv_head` of one row.
template <KvFormat kFormat>
void AttendRow(const AttentionArgs& args, int64_t row, int kv_head, uint8_t* scratch) {
  const int heads = args.heads / args.kv_heads;
  const int64_t first_column = int64_t{kv_head} * heads * args.head_dim;
  const float* q = args.q + row * args.q_stride + first_column;
  const SoftmaxState state = EmptyState(scratch, heads, args.head_dim);
  const int num_tokens = args.positions[row] + 1;
  for (int begin = 0; begin < num_tokens; begin += kPageTokens) {
    const PageView page = ViewPage<kFormat>(args, row, kv_head, begin);
    int h = 0;
    for (; h + 4 <= heads; h += 4) AttendPage<kFormat, 4>(q, page, args.scale, state, h);
    for (; h + 2 <= heads; h += 2) AttendPage<kFormat, 2>(q, page, args.scale, state, h);
    if (h < heads) AttendPage<kFormat, 1>(q, page, args.scale, state, h);
  }
  float* out = args.out + row * args.out_stride + first_column;
  for (int h = 0; h < heads; ++h) {
    const F32x16 sum = Load(state.sums + h * kLanes);
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
template <KvFormat kFormat>
void AttentionOver(const AttentionArgs& args, Executor& executor) {
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
        AttendRow<kFormat>(args, row, kv_head, executor.threads->scratch(thread));
      }
    }
  };
  const int64_t work = int64_t{2} * args.head_dim * args.heads / args.kv_heads;  // per position
  executor.threads->ParallelFor(head_cost * args.kv_heads, MinUnits(work), body);
}

void Attention(const AttentionArgs& args, Executor& executor) {
  switch (args.format) {
    case KvFormat::kBf16:
      return AttentionOver<KvFormat::kBf16>(args, executor);
    case KvFormat::kInt8:
      return AttentionOver<KvFormat::kInt8>(args, executor);
    case KvFormat::kInt4:
      return AttentionOver<KvFormat::kInt4>(args, executor);
    case KvFormat::kInt3:
      return AttentionOver<KvFormat::kInt3>(args, executor);
  }
}

}  // namespace
}  // namespace ternion::kernels
