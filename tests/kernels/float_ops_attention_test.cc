// The KV cache's pages and attention over them.
#include <cmath>
#include <limits>
#include <memory>

#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

struct AttentionShape {
  int heads, kv_heads, head_dim;
};
const AttentionShape kShapes[] = {{1, 1, 16},  {2, 2, 20}, {4, 2, 72}, {8, 2, 64},
                                  {7, 1, 128}, {6, 2, 33}, {5, 1, 2},  {32, 4, 128}};

// A sequence's pages, each of its own allocation so that a sanitizer sees the ends. Slots that
// nobody wrote hold NaN.
struct Cache {
  Cache(const AttentionShape& shape, int num_tokens) {
    const int64_t elements = KvPageElements(shape.kv_heads, shape.head_dim);
    for (int begin = 0; begin < num_tokens; begin += kPageTokens) {
      keys.emplace_back(elements, uint16_t{0x7fc0});
      values.emplace_back(elements, uint16_t{0x7fc0});
      pages.push_back({keys.back().data(), values.back().data()});
    }
  }
  std::vector<std::vector<uint16_t>> keys, values;
  std::vector<KvPage> pages;
};

struct Sequence {
  AttentionShape shape;
  int num_tokens;
  std::vector<float> q, k, v;
  std::unique_ptr<Cache> cache;

  int64_t q_columns() const { return int64_t{shape.heads} * shape.head_dim; }
  int64_t kv_columns() const { return int64_t{shape.kv_heads} * shape.head_dim; }
};

void Store(const Kernels& kernels, Executor& executor, Sequence& sequence) {
  sequence.cache = std::make_unique<Cache>(sequence.shape, sequence.num_tokens);
  std::vector<const KvPage*> tables(sequence.num_tokens, sequence.cache->pages.data());
  std::vector<int32_t> positions(sequence.num_tokens);
  for (int i = 0; i < sequence.num_tokens; ++i) positions[i] = i;
  kernels.kv_store(
      {sequence.k.data(), sequence.v.data(), tables.data(), positions.data(), sequence.num_tokens,
       sequence.kv_columns(), sequence.shape.kv_heads, sequence.shape.head_dim},
      executor);
}

Sequence MakeSequence(const AttentionShape& shape, int num_tokens, uint32_t seed) {
  Sequence sequence = {shape, num_tokens, {}, {}, {}, nullptr};
  sequence.q = RandomFloats(num_tokens * sequence.q_columns(), seed);
  sequence.k = RandomFloats(num_tokens * sequence.kv_columns(), seed + 1);
  sequence.v = RandomFloats(num_tokens * sequence.kv_columns(), seed + 2);
  Executor executor = {&Threads(1)};
  Store(Fastest(), executor, sequence);
  return sequence;
}

float Scale(const AttentionShape& shape) {
  return 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
}

// Rows begin .. end - 1 of the sequence in one call.
std::vector<float> Attend(const Kernels& kernels, Executor& executor, const Sequence& sequence,
                          int begin, int end) {
  const int64_t columns = sequence.q_columns();
  std::vector<const KvPage*> tables(end - begin, sequence.cache->pages.data());
  std::vector<int32_t> positions;
  for (int i = begin; i < end; ++i) positions.push_back(i);
  std::vector<float> out((end - begin) * columns);
  kernels.attention({&sequence.q[begin * columns], tables.data(), positions.data(), out.data(),
                     end - begin, columns, columns, sequence.shape.heads, sequence.shape.kv_heads,
                     sequence.shape.head_dim, Scale(sequence.shape)},
                    executor);
  return out;
}

double Bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return FromBf16(static_cast<uint16_t>(rounded >> 16));
}

// One head of one row, straight from the formula.
std::vector<double> HeadReference(const Sequence& sequence, int row, int head) {
  const AttentionShape& shape = sequence.shape;
  const int kv_head = head / (shape.heads / shape.kv_heads);
  const float* q = &sequence.q[row * sequence.q_columns() + head * shape.head_dim];
  std::vector<double> out(shape.head_dim);
  double total = 0;
  for (int t = 0; t <= row; ++t) {
    const int64_t at = t * sequence.kv_columns() + kv_head * shape.head_dim;
    double score = 0;
    for (int d = 0; d < shape.head_dim; ++d) score += q[d] * Bf16(sequence.k[at + d]);
    const double weight = std::exp(score * Scale(shape));
    total += weight;
    for (int d = 0; d < shape.head_dim; ++d) out[d] += weight * Bf16(sequence.v[at + d]);
  }
  for (double& value : out) value /= total;
  return out;
}

TEST(KvStore, RoundsToNearestEvenAtEachSlot) {
  for (const AttentionShape& shape : kShapes) {
    Sequence sequence = MakeSequence(shape, 150, 1);
    for (int t = 0; t < sequence.num_tokens; ++t) {
      const Cache& cache = *sequence.cache;
      const int page = t / kPageTokens, slot = t % kPageTokens;
      for (int h = 0; h < shape.kv_heads; ++h) {
        for (int d = 0; d < shape.head_dim; ++d) {
          const int64_t c = h * shape.head_dim + d;
          const int64_t at = t * sequence.kv_columns() + c;
          ASSERT_EQ(FromBf16(cache.keys[page][c * kPageTokens + slot]), Bf16(sequence.k[at]));
          ASSERT_EQ(FromBf16(cache.values[page][(h * kPageTokens + slot) * shape.head_dim + d]),
                    Bf16(sequence.v[at]));
        }
      }
    }
    OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      Store(kernels, executor, sequence);
      std::vector<uint16_t> all = sequence.cache->keys[1];
      all.insert(all.end(), sequence.cache->values[1].begin(), sequence.cache->values[1].end());
      return all;
    });
  }
}

TEST(KvStore, SpecialValues) {
  const float infinity = std::numeric_limits<float>::infinity();
  uint32_t signaling_bits = 0x7f800001;  // its upper half alone would be an infinity
  float signaling;
  std::memcpy(&signaling, &signaling_bits, sizeof(signaling));
  for (const char* isa : AvailableIsas()) {
    Sequence sequence = MakeSequence({1, 1, 16}, 1, 2);
    sequence.k = {infinity, -infinity, signaling, -0.0f, std::numeric_limits<float>::max()};
    sequence.k.resize(16, 1.0f + 1.0f / 256);  // halfway between 1 and 1 + 1/128: to even
    Executor executor = {&Threads(1)};
    Store(*SelectCpuKernels(isa), executor, sequence);
    const std::vector<uint16_t>& keys = sequence.cache->keys[0];
    const auto key = [&](int d) { return keys[d * kPageTokens]; };
    EXPECT_EQ(key(0), 0x7f80);
    EXPECT_EQ(key(1), 0xff80);
    EXPECT_TRUE(std::isnan(FromBf16(key(2))));
    EXPECT_EQ(key(3), 0x8000);
    EXPECT_EQ(key(4), 0x7f80);
    for (int d = 5; d < 16; ++d) EXPECT_EQ(key(d), 0x3f80);
  }
}

TEST(Attention, MatchesFormula) {
  for (const AttentionShape& shape : kShapes) {
    SCOPED_TRACE(std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " heads of " +
                 std::to_string(shape.head_dim));
    const Sequence sequence = MakeSequence(shape, 300, 3);
    for (const int row : {0, 1, 15, 16, 63, 64, 127, 128, 200, 255, 256, 299}) {
      SCOPED_TRACE("position " + std::to_string(row));
      const std::vector<float> out =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            return Attend(kernels, executor, sequence, row, row + 1);
          });
      for (int h = 0; h < shape.heads; ++h) {
        const std::vector<float> head(out.begin() + h * shape.head_dim,
                                      out.begin() + (h + 1) * shape.head_dim);
        ExpectNear(head, HeadReference(sequence, row, h), 1e-5);
      }
    }
  }
}

TEST(Attention, OneTokenIsItsValue) {
  const Sequence sequence = MakeSequence({4, 2, 20}, 1, 4);
  Executor executor = {&Threads(1)};
  const std::vector<float> out = Attend(Fastest(), executor, sequence, 0, 1);
  for (int c = 0; c < 80; ++c) EXPECT_EQ(out[c], Bf16(sequence.v[c / 40 * 20 + c % 20]));
}

TEST(Attention, ChunksAndBatchesDoNotMatter) {
  for (const AttentionShape& shape : {AttentionShape{4, 2, 36}, {7, 1, 16}}) {
    const int num_tokens = 170;
    const Sequence sequence = MakeSequence(shape, num_tokens, 5);
    const std::vector<float> whole =
        OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
          return Attend(kernels, executor, sequence, 0, num_tokens);
        });
    for (const int chunk : {1, 7, 64, 130}) {
      std::vector<float> pieces;
      Executor executor = {&Threads(2)};
      for (int begin = 0; begin < num_tokens; begin += chunk) {
        const std::vector<float> piece =
            Attend(Fastest(), executor, sequence, begin, std::min(num_tokens, begin + chunk));
        pieces.insert(pieces.end(), piece.begin(), piece.end());
      }
      ExpectSameBits(pieces, whole);
    }
  }
}

TEST(Attention, RowsOfDifferentSequencesStandAlone) {
  const AttentionShape shape = {4, 2, 40};
  const Sequence a = MakeSequence(shape, 140, 6), b = MakeSequence(shape, 500, 9);
  const int64_t columns = a.q_columns(), stride = columns + 4;
  const std::vector<const KvPage*> tables = {b.cache->pages.data(), a.cache->pages.data(),
                                             b.cache->pages.data()};
  const std::vector<int32_t> positions = {499, 139, 3};
  std::vector<float> q(3 * stride);
  std::copy_n(&b.q[499 * columns], columns, &q[0]);
  std::copy_n(&a.q[139 * columns], columns, &q[stride]);
  std::copy_n(&b.q[3 * columns], columns, &q[2 * stride]);
  const std::vector<float> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    std::vector<float> result(3 * stride, -7.0f);
    kernels.attention({q.data(), tables.data(), positions.data(), result.data(), 3, stride, stride,
                       shape.heads, shape.kv_heads, shape.head_dim, Scale(shape)},
                      executor);
    return result;
  });
  Executor executor = {&Threads(1)};
  std::vector<float> expected;
  for (int i = 0; i < 3; ++i) {
    const std::vector<float> row =
        Attend(Fastest(), executor, i == 1 ? a : b, positions[i], positions[i] + 1);
    expected.insert(expected.end(), row.begin(), row.end());
    expected.insert(expected.end(), 4, -7.0f);
  }
  ExpectSameBits(out, expected);
}

TEST(Attention, LargeScoresDoNotOverflow) {
  Sequence sequence = MakeSequence({2, 1, 16}, 200, 10);
  for (float& q : sequence.q) q *= 1000.0f;
  Executor executor = {&Threads(1)};
  for (float value : Attend(Fastest(), executor, sequence, 150, 200)) {
    EXPECT_TRUE(std::isfinite(value));
  }
}

}  // namespace
}  // namespace ternion::kernels
