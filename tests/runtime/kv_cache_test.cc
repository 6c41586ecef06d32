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
constexpr int64_t kElements = kernels::KvPageElements(2, 4);

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
      std::fill_n(pages.table(layer)[p].keys, kElements, value);
      std::fill_n(pages.table(layer)[p].values, kElements, value);
    }
  }
}

void ExpectFilled(const KvPages& pages, uint16_t value) {
  for (int layer = 0; layer < kShape.num_layers; ++layer) {
    for (int64_t p = 0; p < NumPages(pages); ++p) {
      const kernels::KvPage& page = pages.table(layer)[p];
      const auto is_value = [&](uint16_t element) { return element == value; };
      ASSERT_TRUE(std::all_of(page.keys, page.keys + kElements, is_value));
      ASSERT_TRUE(std::all_of(page.values, page.values + kElements, is_value));
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
    std::set<const uint16_t*> distinct;
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
