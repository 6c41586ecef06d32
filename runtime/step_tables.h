// The rows of one rank in one step, and what the step's ops read of them.
#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "kernels/kernels.h"
#include "runtime/kv_cache.h"

namespace ternion::runtime {

// A row is one token of one sequence.
struct Batch {
  uint32_t step = 0;
  // 2: in a MoE model the rows go through the layers in two halves, so that one half's rows travel
  // while the other's are worked on. The same on every rank; no result depends on it.
  int micro_batches = 1;
  std::vector<int32_t> tokens;        // [rows]
  std::vector<int32_t> positions;     // [rows] in the row's sequence
  std::vector<const KvPages*> pages;  // [rows] of the row's sequence; not null

  int64_t num_rows() const { return static_cast<int64_t>(tokens.size()); }
  void Clear();
};

// Tokens, positions and page tables of a batch, written by the host and read by ops: one block of
// memory, so that one copy takes it to a device.
class StepTables {
 public:
  StepTables(int64_t max_rows, int num_layers, const kernels::Executor& executor);

  // Where the host writes. No op still reads what was there.
  void Write(const Batch& batch);
  // Brings what was written to where ops read.
  void Upload(const kernels::Kernels& kernels, kernels::Executor& executor);

  // For ops only.
  const int32_t* tokens() const { return At<int32_t>(0); }                               // [rows]
  const int32_t* positions() const { return At<int32_t>(max_rows_ * sizeof(int32_t)); }  // [rows]
  const kernels::KvPage* const* pages(int layer) const {                                 // [rows]
    return At<const kernels::KvPage*>(PagesOffset(layer));
  }
  // No row sees more: that of the longest, rounded up to a power of two of pages.
  int64_t max_tokens() const { return max_tokens_; }

 private:
  size_t PagesOffset(int layer) const {
    return 2 * max_rows_ * sizeof(int32_t) + layer * max_rows_ * sizeof(kernels::KvPage*);
  }
  template <typename T>
  const T* At(size_t offset) const {
    const base::Buffer& memory = for_ops_.size() > 0 ? for_ops_ : staging_;
    return reinterpret_cast<const T*>(memory.data() + offset);
  }

  const int64_t max_rows_;
  const int num_layers_;
  base::Buffer staging_;  // tokens [max_rows], positions [max_rows], page tables [layers, max_rows]
  base::Buffer for_ops_;  // the same in the executor's memory; empty where that is the host's
  int64_t max_tokens_ = 0;
};

}  // namespace ternion::runtime
