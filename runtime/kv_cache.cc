#include "runtime/kv_cache.h"

#include <utility>

#include "base/status.h"

namespace ternion::runtime {

KvPages::~KvPages() {
  if (cache_ != nullptr) cache_->free_.insert(cache_->free_.end(), ids_.rbegin(), ids_.rend());
}

KvPages& KvPages::operator=(KvPages&& other) noexcept {
  std::swap(cache_, other.cache_);
  std::swap(ids_, other.ids_);
  std::swap(table_, other.table_);
  std::swap(first_, other.first_);
  return *this;
}

KvCache::KvCache(const KvShape& shape, int64_t capacity_tokens, const kernels::Executor& executor)
    : shape_(shape),
      executor_(executor),
      num_pages_(PagesFor(capacity_tokens)),
      memory_(num_pages_ * shape.num_layers * shape.page().bytes(), *executor.memory) {
  for (int64_t id = num_pages_ - 1; id >= 0; --id) free_.push_back(static_cast<int32_t>(id));
}

absl::StatusOr<KvPages> KvCache::Reserve(int64_t tokens) {
  const int64_t count = PagesFor(tokens);
  if (count > free_pages()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(tokens, " tokens need ", count, " KV pages; ", free_pages(), " are free"));
  }
  KvPages pages;
  pages.cache_ = this;
  pages.ids_.assign(free_.end() - count, free_.end());
  free_.resize(free_.size() - count);
  const kernels::KvPageSize size = shape_.page();
  const bool scaled = shape_.format != kernels::KvFormat::kBf16;
  const int64_t row = int64_t{2} * shape_.kv_heads * shape_.head_dim;
  if (scaled) pages.first_ = base::Array<uint16_t>(shape_.num_layers * row, *executor_.memory);
  pages.table_ = base::Array<kernels::KvPage>(shape_.num_layers * count);
  kernels::KvPage* page = pages.table_.data();
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    for (int32_t id : pages.ids_) {
      uint8_t* keys = memory_.data() + (int64_t{id} * shape_.num_layers + layer) * size.bytes();
      uint8_t* values = keys + size.key_bytes;
      *page = {.keys = keys, .values = values};
      if (scaled) {
        page->key_scales = reinterpret_cast<float*>(values + size.value_bytes);
        page->value_scales = page->key_scales + size.scale_bytes / sizeof(float);
        if (id == pages.ids_[0]) page->first = pages.first_.data() + layer * row;
      }
      ++page;
    }
  }
  pages.table_.MoveTo(*executor_.memory);
  return pages;
}

}  // namespace ternion::runtime
