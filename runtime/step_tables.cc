#include "runtime/step_tables.h"

#include <algorithm>
#include <bit>

namespace ternion::runtime {

void Batch::Clear() {
  tokens.clear();
  positions.clear();
  pages.clear();
}

StepTables::StepTables(int64_t max_rows, int num_layers, const kernels::Executor& executor)
    : max_rows_(base::RoundUp(max_rows, int64_t{2})),  // pointers stay aligned
      num_layers_(num_layers),
      staging_(PagesOffset(num_layers), *executor.staging) {
  if (executor.staging != executor.memory) {
    for_ops_ = base::Buffer(staging_.size(), *executor.memory);
  }
}

void StepTables::Write(const Batch& batch) {
  int32_t* const tokens = reinterpret_cast<int32_t*>(staging_.data());
  std::copy(batch.tokens.begin(), batch.tokens.end(), tokens);
  std::copy(batch.positions.begin(), batch.positions.end(), tokens + max_rows_);
  for (int layer = 0; layer < num_layers_; ++layer) {
    auto* tables = reinterpret_cast<const kernels::KvPage**>(staging_.data() + PagesOffset(layer));
    for (const KvPages* pages : batch.pages) *tables++ = pages->table(layer);
  }
  int32_t last = 0;
  for (const int32_t position : batch.positions) last = std::max(last, position);
  const auto pages = static_cast<uint64_t>(last / kernels::kPageTokens + 1);
  max_tokens_ = static_cast<int64_t>(std::bit_ceil(pages)) * kernels::kPageTokens;
}

void StepTables::Upload(const kernels::Kernels& kernels, kernels::Executor& executor) {
  if (for_ops_.size() == 0) return;
  kernels.copy({staging_.data(), for_ops_.data(), static_cast<int64_t>(for_ops_.size())}, executor);
}

}  // namespace ternion::runtime
