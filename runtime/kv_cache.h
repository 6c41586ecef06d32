// This rank's KV pages.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "base/buffer.h"
#include "kernels/kernels.h"

namespace ternion::runtime {

struct KvShape {
  int num_layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  kernels::KvFormat format = kernels::KvFormat::kBf16;

  kernels::KvPageSize page() const {  // of one layer
    return kernels::SizeOfKvPage(format, kv_heads, head_dim);
  }
  // Bytes that one token takes over all layers: keys, values and their scales.
  int64_t bytes_per_token() const { return num_layers * page().bytes() / kernels::kPageTokens; }
};

class KvCache;

// The pages of one sequence, returned to the cache on destruction. Page p of layer l is
// table(l)[p].
class KvPages {
 public:
  KvPages() = default;
  ~KvPages();
  KvPages(KvPages&& other) noexcept { *this = std::move(other); }
  KvPages& operator=(KvPages&& other) noexcept;

  const kernels::KvPage* table(int layer) const { return table_.data() + layer * ids_.size(); }
  int64_t capacity_tokens() const {
    return static_cast<int64_t>(ids_.size()) * kernels::kPageTokens;
  }

 private:
  friend class KvCache;

  KvCache* cache_ = nullptr;
  std::vector<int32_t> ids_;            // [pages]
  base::Array<kernels::KvPage> table_;  // [layers, pages]
  base::Array<uint16_t> first_;  // [layers, {K, V}, kv_heads, head_dim] of position 0, below bf16
};

// A pool of pages; one page id stands for the same 128 tokens in every layer. Memory is taken from
// the system when a page is first written. Outlives its KvPages. One thread.
class KvCache {
 public:
  // Pages and their tables lie in the executor's memory.
  KvCache(const KvShape& shape, int64_t capacity_tokens, const kernels::Executor& executor = {});
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Pages for `tokens` tokens. ResourceExhausted when too few are free.
  absl::StatusOr<KvPages> Reserve(int64_t tokens);

  int64_t num_pages() const { return num_pages_; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  int64_t bytes() const { return static_cast<int64_t>(memory_.size()); }
  static int64_t PagesFor(int64_t tokens) { return base::CeilDiv(tokens, kernels::kPageTokens); }

 private:
  friend class KvPages;

  const KvShape shape_;
  const kernels::Executor executor_;
  const int64_t num_pages_;
  base::Buffer memory_;  // [pages, layers] of keys, values, key scales, value scales
  std::vector<int32_t> free_;
};

}  // namespace ternion::runtime
