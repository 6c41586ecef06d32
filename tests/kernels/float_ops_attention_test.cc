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
const AttentionShape kShapes[] = {{1, 1, 16}, {2, 2, 20}, {4, 2, 72},   {8, 2, 64}, {7, 1, 128},
                                  {6, 2, 33}, {5, 1, 2},  {32, 4, 128}, {3, 1, 300}};

constexpr KvFormat kFormats[] = {KvFormat::kBf16, KvFormat::kInt8, KvFormat::kInt4,
                                 KvFormat::kInt3};

// A sequence's pages, each part of its own allocation so that a sanitizer sees the ends. Slots that
// nobody wrote hold NaN, scales too.
struct Cache {
  Cache(const AttentionShape& shape, KvFormat format, int num_tokens)
      : first(2 * shape.kv_heads * shape.head_dim) {
    const KvPageSize size = SizeOfKvPage(format, shape.kv_heads, shape.head_dim);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int begin = 0; begin < num_tokens; begin += kPageTokens) {
      keys.emplace_back(size.key_bytes / 2, uint16_t{0x7fc0});
      values.emplace_back(size.value_bytes / 2, uint16_t{0x7fc0});
      key_scales.emplace_back(size.scale_bytes / 4, nan);
      value_scales.emplace_back(size.scale_bytes / 4, nan);
      pages.push_back({keys.back().data(), values.back().data()});
      if (format == KvFormat::kBf16) continue;
      pages.back().key_scales = key_scales.back().data();
      pages.back().value_scales = value_scales.back().data();
      if (begin == 0) pages.back().first = first.data();
    }
  }
  std::vector<std::vector<uint16_t>> keys, values;
  std::vector<std::vector<float>> key_scales, value_scales;
  std::vector<uint16_t> first;
  std::vector<KvPage> pages;
};

struct Sequence {
  AttentionShape shape;
  int num_tokens;
  KvFormat format;
  std::vector<float> q, k, v;
  std::unique_ptr<Cache> cache;

  int64_t q_columns() const { return int64_t{shape.heads} * shape.head_dim; }
  int64_t kv_columns() const { return int64_t{shape.kv_heads} * shape.head_dim; }
};

// Into pages of its own, rows in chunks of `chunk`.
void Store(const Kernels& kernels, Executor& executor, Sequence& sequence, int chunk = 1 << 20) {
  sequence.cache = std::make_unique<Cache>(sequence.shape, sequence.format, sequence.num_tokens);
  std::vector<const KvPage*> tables(sequence.num_tokens, sequence.cache->pages.data());
  std::vector<int32_t> positions(sequence.num_tokens);
  for (int i = 0; i < sequence.num_tokens; ++i) positions[i] = i;
  for (int64_t begin = 0; begin < sequence.num_tokens; begin += chunk) {
    const int64_t at = begin * sequence.kv_columns();
    kernels.kv_store({.k = sequence.k.data() + at,
                      .v = sequence.v.data() + at,
                      .pages = tables.data(),
                      .positions = positions.data() + begin,
                      .num_rows = std::min<int64_t>(chunk, sequence.num_tokens - begin),
                      .stride = sequence.kv_columns(),
                      .kv_heads = sequence.shape.kv_heads,
                      .head_dim = sequence.shape.head_dim,
                      .format = sequence.format},
                     executor);
  }
}

Sequence MakeSequence(const AttentionShape& shape, int num_tokens, uint32_t seed,
                      KvFormat format = KvFormat::kBf16) {
  Sequence sequence = {shape, num_tokens, format, {}, {}, {}, nullptr};
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

// Rows begin .. end - 1 of the sequence in one call, which knows the longest row or does not.
std::vector<float> Attend(const Kernels& kernels, Executor& executor, const Sequence& sequence,
                          int begin, int end, bool knows_longest = true) {
  const int64_t columns = sequence.q_columns();
  std::vector<const KvPage*> tables(end - begin, sequence.cache->pages.data());
  std::vector<int32_t> positions;
  for (int i = begin; i < end; ++i) positions.push_back(i);
  std::vector<float> out((end - begin) * columns);
  kernels.attention({.q = &sequence.q[begin * columns],
                     .pages = tables.data(),
                     .positions = positions.data(),
                     .out = out.data(),
                     .num_rows = end - begin,
                     .max_tokens = knows_longest ? end : 0,
                     .q_stride = columns,
                     .out_stride = columns,
                     .heads = sequence.shape.heads,
                     .kv_heads = sequence.shape.kv_heads,
                     .head_dim = sequence.shape.head_dim,
                     .scale = Scale(sequence.shape),
                     .format = sequence.format},
                    executor);
  return out;
}

double Bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return FromBf16(static_cast<uint16_t>(rounded >> 16));
}

// What a cache of `format` keeps of x [head_dim] at `position`, from the formulas of kv_page.h.
std::vector<double> Kept(KvFormat format, int position, const float* x, int head_dim) {
  std::vector<double> kept(head_dim);
  float m = 1e-5f;
  for (int d = 0; d < head_dim; ++d) m = std::max(m, std::abs(x[d]));
  const float levels = format == KvFormat::kInt8 ? 127 : 1 << (KvBits(format) - 1);
  for (int d = 0; d < head_dim; ++d) {
    const float scaled = x[d] * (levels / m);
    if (format == KvFormat::kBf16 || position == 0) {
      kept[d] = Bf16(x[d]);
    } else if (format == KvFormat::kInt8) {
      kept[d] = std::clamp(std::nearbyint(scaled), -127.0f, 127.0f) * (m / 127.0f);
    } else {
      kept[d] = (std::clamp(std::floor(scaled), -levels, levels - 1) + 0.5f) * (m / levels);
    }
  }
  return kept;
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
    const std::vector<double> k = Kept(sequence.format, t, &sequence.k[at], shape.head_dim);
    const std::vector<double> v = Kept(sequence.format, t, &sequence.v[at], shape.head_dim);
    double score = 0;
    for (int d = 0; d < shape.head_dim; ++d) score += q[d] * k[d];
    const double weight = std::exp(score * Scale(shape));
    total += weight;
    for (int d = 0; d < shape.head_dim; ++d) out[d] += weight * v[d];
  }
  for (double& value : out) value /= total;
  return out;
}

// All bytes of a cache.
std::vector<uint8_t> Bytes(const Cache& cache) {
  std::vector<uint8_t> all;
  const auto add = [&](const auto& part) {
    const uint8_t* data = reinterpret_cast<const uint8_t*>(part.data());
    all.insert(all.end(), data, data + part.size() * sizeof(part[0]));
  };
  add(cache.first);
  for (size_t page = 0; page < cache.pages.size(); ++page) {
    add(cache.keys[page]);
    add(cache.values[page]);
    add(cache.key_scales[page]);
    add(cache.value_scales[page]);
  }
  return all;
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

TEST(KvStore, EveryFormatIsTheSameOnEveryVariantAndInChunks) {
  for (const AttentionShape& shape : {AttentionShape{4, 2, 36}, {3, 3, 128}, {5, 1, 2}}) {
    for (const KvFormat format : kFormats) {
      SCOPED_TRACE(KvFormatName(format));
      Sequence sequence = MakeSequence(shape, 200, 11, format);
      const std::vector<uint8_t> expected =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            Store(kernels, executor, sequence);
            return Bytes(*sequence.cache);
          });
      Executor executor = {&Threads(3)};
      Store(Fastest(), executor, sequence, 7);
      ExpectSameBits(Bytes(*sequence.cache), expected);
      // Over what another sequence left: nothing of it stays (but in the unused slot of position
      // 0).
      const Sequence other = MakeSequence(shape, 200, 14, format);
      std::vector<const KvPage*> tables(199, sequence.cache->pages.data());
      std::vector<int32_t> positions;
      for (int i = 1; i < 200; ++i) positions.push_back(i);
      for (const Sequence* source : {&other, static_cast<const Sequence*>(&sequence)}) {
        Fastest().kv_store({.k = source->k.data() + source->kv_columns(),
                            .v = source->v.data() + source->kv_columns(),
                            .pages = tables.data(),
                            .positions = positions.data(),
                            .num_rows = 199,
                            .stride = source->kv_columns(),
                            .kv_heads = shape.kv_heads,
                            .head_dim = shape.head_dim,
                            .format = format},
                           executor);
      }
      ExpectSameBits(Bytes(*sequence.cache), expected);
    }
  }
}

TEST(KvStore, AHeadOfZerosAndOneOfNaNStayInRange) {
  for (const KvFormat format : {KvFormat::kInt8, KvFormat::kInt4, KvFormat::kInt3}) {
    Sequence sequence = MakeSequence({2, 2, 16}, 2, 12, format);
    std::fill_n(&sequence.k[32], 16, 0.0f);
    sequence.v[40] = std::numeric_limits<float>::quiet_NaN();
    OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      Store(kernels, executor, sequence);
      return Bytes(*sequence.cache);
    });
    const float worth = format == KvFormat::kInt8   ? 1e-5f / 127
                        : format == KvFormat::kInt4 ? 1e-5f / 8
                                                    : 1e-5f / 4;
    EXPECT_EQ(sequence.cache->key_scales[0][1], worth);
  }
}

TEST(KvPage, SizesAndNames) {
  EXPECT_EQ(SizeOfKvPage(KvFormat::kBf16, 2, 128).bytes(), 2 * 2 * 128 * 128 * 2);
  EXPECT_EQ(SizeOfKvPage(KvFormat::kInt8, 2, 128).bytes(), 2 * 2 * 128 * (128 + 4));
  EXPECT_EQ(SizeOfKvPage(KvFormat::kInt4, 2, 128).bytes(), 2 * 2 * 128 * (64 + 4));
  EXPECT_EQ(SizeOfKvPage(KvFormat::kInt3, 2, 128).bytes(), 2 * 2 * 128 * (48 + 4));
  EXPECT_EQ(SizeOfKvPage(KvFormat::kInt3, 1, 20).key_bytes, 20 * 48);
  EXPECT_EQ(SizeOfKvPage(KvFormat::kInt3, 1, 20).value_bytes, 128 * 12);  // two blocks of 16
  for (const KvFormat format : kFormats) {
    EXPECT_EQ(ParseKvFormat(KvFormatName(format)), format);
    EXPECT_EQ(KvFormatOfBits(KvBits(format)), format);
  }
  EXPECT_EQ(ParseKvFormat("auto"), std::nullopt);
  EXPECT_EQ(KvFormatOfBits(5), std::nullopt);
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
    for (const KvFormat format : kFormats) {
      SCOPED_TRACE(std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) +
                   " heads of " + std::to_string(shape.head_dim) + ", " + KvFormatName(format));
      const Sequence sequence = MakeSequence(shape, 300, 3, format);
      for (const int row : {0, 1, 15, 16, 63, 64, 127, 128, 200, 255, 256, 299}) {
        SCOPED_TRACE("position " + std::to_string(row));
        const std::vector<float> out =
            OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
              return Attend(kernels, executor, sequence, row, row + 1);
            });
        OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
          const std::vector<float> same = Attend(kernels, executor, sequence, row, row + 1, false);
          ExpectSameBits(same, out);
          return same;
        });
        for (int h = 0; h < shape.heads; ++h) {
          const std::vector<float> head(out.begin() + h * shape.head_dim,
                                        out.begin() + (h + 1) * shape.head_dim);
          ExpectNear(head, HeadReference(sequence, row, h), 1e-5);
        }
      }
    }
  }
}

TEST(Attention, OneTokenIsItsValue) {
  // At every format: position 0 stays bf16.
  for (const KvFormat format : kFormats) {
    const Sequence sequence = MakeSequence({4, 2, 20}, 1, 4, format);
    Executor executor = {&Threads(1)};
    const std::vector<float> out = Attend(Fastest(), executor, sequence, 0, 1);
    for (int c = 0; c < 80; ++c) EXPECT_EQ(out[c], Bf16(sequence.v[c / 40 * 20 + c % 20]));
  }
}

// On a device, whose scratch then takes some rows with so many pages at once, not all of them.
Executor WithScratchFor(int rows, const AttentionShape& shape, int pages, Executor executor) {
  const size_t bytes = rows * pages * shape.heads * (2 + shape.head_dim) * sizeof(float);
  executor.scratch = executor.scratch.first(std::min(executor.scratch.size(), bytes + 1));
  return executor;
}

TEST(Attention, ChunksAndBatchesDoNotMatter) {
  const int num_tokens = 170;
  for (const AttentionShape& shape : {AttentionShape{4, 2, 36}, {7, 1, 16}}) {
    for (const KvFormat format : kFormats) {
      Sequence sequence = MakeSequence(shape, num_tokens, 5, format);
      const std::vector<float> whole =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            Executor small = WithScratchFor(9, shape, 2, executor);
            return Attend(kernels, small, sequence, 0, num_tokens);
          });
      for (const int chunk : {1, 7, 64, 130}) {
        std::vector<float> pieces;
        Executor executor = {&Threads(2)};
        Store(Fastest(), executor, sequence, chunk);
        for (int begin = 0; begin < num_tokens; begin += chunk) {
          const std::vector<float> piece =
              Attend(Fastest(), executor, sequence, begin, std::min(num_tokens, begin + chunk));
          pieces.insert(pieces.end(), piece.begin(), piece.end());
        }
        ExpectSameBits(pieces, whole);
      }
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
    Executor small = WithScratchFor(1, shape, 4, executor);
    kernels.attention({.q = q.data(),
                       .pages = tables.data(),
                       .positions = positions.data(),
                       .out = result.data(),
                       .num_rows = 3,
                       .max_tokens = 500,
                       .q_stride = stride,
                       .out_stride = stride,
                       .heads = shape.heads,
                       .kv_heads = shape.kv_heads,
                       .head_dim = shape.head_dim,
                       .scale = Scale(shape)},
                      small);
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
  for (const KvFormat format : kFormats) {
    Sequence sequence = MakeSequence({2, 1, 16}, 200, 10, format);
    for (float& q : sequence.q) q *= 1000.0f;
    Executor executor = {&Threads(1)};
    for (float value : Attend(Fastest(), executor, sequence, 150, 200)) {
      EXPECT_TRUE(std::isfinite(value));
    }
  }
}

TEST(Hadamard, IsTheMatrixAndItsOwnInverse) {
  for (int head_dim = 1; head_dim <= 256; head_dim *= 2) {
    const int heads = 3, rows = 5, stride = heads * head_dim + 3;
    const std::vector<float> x = RandomFloats(rows * stride, head_dim);
    std::vector<float> rotated = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      std::vector<float> result = x;
      kernels.hadamard({result.data(), rows, stride, heads, head_dim}, executor);
      return result;
    });
    const double norm = 1 / std::sqrt(static_cast<double>(head_dim));
    std::vector<double> expected(x.begin(), x.end());
    for (int row = 0; row < rows; ++row) {
      for (int c = 0; c < heads * head_dim; ++c) {
        const int i = c % head_dim;
        double sum = 0;
        for (int j = 0; j < head_dim; ++j) {
          const double value = x[row * stride + c - i + j];
          sum += __builtin_parity(static_cast<unsigned>(i & j)) ? -value : value;
        }
        expected[row * stride + c] = sum * norm;
      }
    }
    ExpectNear(rotated, expected, 1e-5);
    Executor executor = {&Threads(1)};
    Fastest().hadamard({rotated.data(), rows, stride, heads, head_dim}, executor);
    ExpectNear(rotated, {x.begin(), x.end()}, 1e-5);
  }
}

}  // namespace
}  // namespace ternion::kernels
