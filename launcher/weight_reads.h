// What steps read of the weights, counted as their ops are called.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "base/buffer.h"
#include "kernels/kernels.h"

namespace ternion::launcher {

// What some steps had to read of the weights at least, on one rank. A matrix that a step multiplies
// by counts once, however many rows or groups it is multiplied with. One that the gate chose for no
// row does not; nor do lines that add nothing to any row (kernels/kernels.h, TernaryGroup) where
// the kernels skip such. Rows of the embedding are left out.
struct WeightReadCounts {
  int64_t steps = 0;
  int64_t rows = 0;              // of this rank, over the steps
  int64_t ternary_matrices = 0;  // likewise
  int64_t bytes = 0;             // likewise, of codes and of dense matrices
};

// A table of kernels like another one, which counts. Ops have no object of their own: those that
// are called on a thread are counted by the one WeightReads that it has made, if that is counting.
class WeightReads {
 public:
  // Both outlive it.
  WeightReads(const kernels::Kernels& kernels, const kernels::Executor& executor);
  ~WeightReads();
  WeightReads(const WeightReads&) = delete;
  WeightReads& operator=(const WeightReads&) = delete;

  const kernels::Kernels& kernels() const { return counting_kernels_; }

  // From now on until Stop, which says what came of it. Steps in between are slow: lines are looked
  // at one by one, and a device is waited for where it knows alone which experts have rows; it
  // records nothing.
  void Start();
  WeightReadCounts Stop();

 private:
  // The thread's.
  static WeightReads& Current();
  static void TernaryMatmul(const kernels::TernaryMatmulArgs& args, kernels::Executor& executor);
  static void DenseMatmul(const kernels::DenseMatmulArgs& args, kernels::Executor& executor);
  static void ExpertMatmul(const kernels::ExpertMatmulArgs& args, kernels::Executor& executor);
  static void Embed(const kernels::EmbedArgs& args, kernels::Executor& executor);

  void Count(const kernels::ExpertMatmulArgs& args, kernels::Executor& executor);
  void EndStep();

  const kernels::Kernels& kernels_;
  kernels::Kernels counting_kernels_;
  base::Array<int32_t> begin_;  // [num_experts + 1] of ExpertMatmulArgs, where the host reads it
  base::Memory& staging_;
  bool is_counting_ = false;
  WeightReadCounts counts_;
  // By where a matrix (or what describes it) lies: bytes read in this step.
  std::unordered_map<const void*, int64_t> ternary_bytes_, dense_bytes_;
};

}  // namespace ternion::launcher
