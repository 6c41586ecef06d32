#include "runtime/kv_cache.h"

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/status.h"

namespace ternion::runtime {
namespace {

constexpr KvShape kShape = {.num_layers = 3, .kv_heads = 2, .head_dim = 4};
constexpr int64_t kElements = 2 * 4 * kernels::kPageTokens;

int64_t NumPages(const KvPages& pages) { return pages.capacity_tokens() / kernels::kPageTokens; }

void ExpectExhausted(KvCache& cache, int64_t tokens) {
  const int64_t free = cache.free_pages();
  EXPECT_TRUE(test::IsError(cache.Reserve(tokens).status(), absl::StatusCode::kResourceExhausted,
                            "KV pages"));
  EXPECT_EQ(cache.free_pages(), free);
}

// Sets or checks every element of the sequence's pages.
void Fill(const KvPages& pages, uint16_t value) {
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    for (int64_t p = 0; p < NumPages(pages); ++p) {
      std::fill_n(static_cast<uint16_t*>(pages.table(layer)[p].keys), kElements, value);
      std::fill_n(static_cast<uint16_t*>(pages.table(layer)[p].values), kElements, value);
    }
  }
}

void ExpectFilled(const KvPages& pages, uint16_t value) {
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    for (int64_t p = 0; p < NumPages(pages); ++p) {
      const kernels::KvPage& page = pages.table(layer)[p];
      const auto is_value = [&](uint16_t element) { return element == value; };
      const uint16_t* keys = static_cast<const uint16_t*>(page.keys);
      const uint16_t* values = static_cast<const uint16_t*>(page.values);
      ASSERT_TRUE(std::all_of(keys, keys + kElements, is_value));
      ASSERT_TRUE(std::all_of(values, values + kElements, is_value));
    }
  }
}

TEST(KvCache, CapacityIsInWholePages) {
  EXPECT_EQ(KvCache::PagesFor(1), 1);
  EXPECT_EQ(KvCache::PagesFor(kernels::kPageTokens), 1);
  EXPECT_EQ(KvCache::PagesFor(kernels::kPageTokens + 1), 2);
  KvCache cache(kShape, 2 * kernels::kPageTokens + 1);
  EXPECT_EQ(cache.num_pages(), 3);
  EXPECT_EQ(cache.free_pages(), 3);
  EXPECT_EQ(kShape.bytes_per_token(), 3 * 2 * 2 * 4 * 2);
}

TEST(KvCache, FewerBitsTakeFewerBytes) {
  KvShape shape = {.num_layers = 3, .kv_heads = 2, .head_dim = 128};
  using kernels::KvFormat;
  const int64_t vectors = 3 * 2 * 2;  // layers, KV heads, K and V
  const std::pair<KvFormat, int64_t> bytes[] = {{KvFormat::kBf16, 256},
                                                {KvFormat::kInt8, 128 + 4},
                                                {KvFormat::kInt4, 64 + 4},
                                                {KvFormat::kInt3, 48 + 4}};
  for (const auto& [format, of_vector] : bytes) {
    shape.format = format;
    EXPECT_EQ(shape.bytes_per_token(), vectors * of_vector);
  }
}

// No part of a page overlaps another, and only a sequence's page 0 has a place for position 0.
TEST(KvCache, PagesBelowBf16HaveScalesAndAFirstRow) {
  using kernels::KvFormat;
  for (const KvFormat format : {KvFormat::kInt8, KvFormat::kInt4, KvFormat::kInt3}) {
    const KvShape shape = {.num_layers = 3, .kv_heads = 2, .head_dim = 10, .format = format};
    const kernels::KvPageSize size = shape.page();
    KvCache cache(shape, 5 * kernels::kPageTokens);
    const KvPages a = *cache.Reserve(3 * kernels::kPageTokens);
    const KvPages b = *cache.Reserve(2 * kernels::kPageTokens);
    std::vector<std::pair<const char*, int64_t>> parts;
    for (const KvPages* pages : {&a, &b}) {
      for (int layer = 0; layer < shape.num_layers; ++layer) {
        for (int64_t p = 0; p < NumPages(*pages); ++p) {
          const kernels::KvPage& page = pages->table(layer)[p];
          EXPECT_EQ(page.first != nullptr, p == 0);
          parts.emplace_back(static_cast<const char*>(page.keys), size.key_bytes);
          parts.emplace_back(static_cast<const char*>(page.values), size.value_bytes);
          for (float* scales : {page.key_scales, page.value_scales}) {
            EXPECT_EQ(reinterpret_cast<uintptr_t>(scales) % alignof(float), 0u);
            parts.emplace_back(reinterpret_cast<const char*>(scales), size.scale_bytes);
          }
          if (p == 0) parts.emplace_back(reinterpret_cast<const char*>(page.first), 2 * 2 * 10 * 2);
        }
      }
    }
    std::sort(parts.begin(), parts.end());
    for (size_t i = 1; i < parts.size(); ++i) {
      EXPECT_LE(parts[i - 1].first + parts[i - 1].second, parts[i].first);
    }
  }
}

TEST(KvCache, PagesComeBack) {
  KvCache cache(kShape, 4 * kernels::kPageTokens);
  {
    const auto a = cache.Reserve(3 * kernels::kPageTokens);
    ASSERT_TRUE(a.ok());
    EXPECT_EQ(a->capacity_tokens(), 3 * kernels::kPageTokens);
    EXPECT_EQ(cache.free_pages(), 1);
    ExpectExhausted(cache, kernels::kPageTokens + 1);
    EXPECT_TRUE(cache.Reserve(kernels::kPageTokens).ok());
  }
  EXPECT_EQ(cache.free_pages(), 4);
  ExpectExhausted(cache, 4 * kernels::kPageTokens + 1);
}

TEST(KvCache, MovedPagesComeBackOnce) {
  KvCache cache(kShape, 4 * kernels::kPageTokens);
  {
    KvPages a = *cache.Reserve(1);
    KvPages b(std::move(a));
    EXPECT_EQ(a.capacity_tokens(), 0);
    KvPages c = *cache.Reserve(2 * kernels::kPageTokens);
    EXPECT_EQ(cache.free_pages(), 1);
    c = std::move(b);
    b = KvPages();
    EXPECT_EQ(c.capacity_tokens(), kernels::kPageTokens);
    EXPECT_EQ(cache.free_pages(), 3);
  }
  EXPECT_EQ(cache.free_pages(), 4);
}

// Sequences come and go; none sees another's elements.
TEST(KvCache, RandomSequencesNeverShareAPage) {
  std::mt19937 random(7);
  KvCache cache(kShape, 12 * kernels::kPageTokens);
  std::vector<std::pair<uint16_t, KvPages>> sequences;
  uint16_t next = 1;
  int refused = 0;
  for (int round = 0; round < 400; ++round) {
    if (random() % 2 == 0 && !sequences.empty()) {
      const size_t i = random() % sequences.size();
      ASSERT_NO_FATAL_FAILURE(ExpectFilled(sequences[i].second, sequences[i].first));
      sequences.erase(sequences.begin() + i);
    } else {
      const int64_t tokens = 1 + random() % (5 * kernels::kPageTokens);
      if (KvCache::PagesFor(tokens) > cache.free_pages()) {
        ExpectExhausted(cache, tokens);
        ++refused;
        continue;
      }
      auto pages = cache.Reserve(tokens);
      ASSERT_TRUE(pages.ok()) << pages.status();
      EXPECT_GE(pages->capacity_tokens(), tokens);
      Fill(*pages, next);
      sequences.emplace_back(next++, *std::move(pages));
    }
    int64_t held = 0;
    std::set<const void*> distinct;
    for (const auto& [value, pages] : sequences) {
      held += NumPages(pages);
      for (int64_t p = 0; p < NumPages(pages); ++p) distinct.insert(pages.table(1)[p].keys);
    }
    EXPECT_EQ(static_cast<int64_t>(distinct.size()), held);
    EXPECT_EQ(cache.free_pages(), cache.num_pages() - held);
  }
  EXPECT_GT(refused, 10);
}

}  // namespace
}  // namespace ternion::runtime
