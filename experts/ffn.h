// The gated feed-forward of a ternary block: down(quantize(norm(act(gate x) * up x))).
//
// One code path serves dense MLPs, shared experts and routed experts: a list of (weights, rows)
// groups.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "kernels/kernels.h"

namespace ternion::experts {

// Any layouts; with relu2, up in kRows and down in kColumns let codes that add nothing stay unread.
struct FfnWeights {
  kernels::OwnedTernaryMatrix gate;  // [intermediate, hidden]
  kernels::OwnedTernaryMatrix up;    // [intermediate, hidden]
  kernels::OwnedTernaryMatrix down;  // [hidden, intermediate]
};

// What all feed-forwards of one layer share.
struct FfnConfig {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  kernels::Activation activation = kernels::Activation::kSilu;
  const float* sub_norm = nullptr;  // [intermediate] ffn_sub_norm, or null: none
  float eps = 0;
};

// Consecutive rows of the input that go through one feed-forward.
struct FfnGroup {
  const FfnWeights* weights = nullptr;
  int64_t row_begin = 0;
  int64_t num_rows = 0;
};

// Scratch for up to `max_rows` rows; reused by every layer of a rank.
class FfnWorkspace {
 public:
  FfnWorkspace(int64_t max_rows, int64_t max_intermediate,
               base::Memory& memory = base::HostMemory());

  int64_t max_rows() const { return max_rows_; }

 private:
  friend void RunFfn(const kernels::Kernels&, kernels::Executor&, const FfnConfig&,
                     const kernels::QuantizedRows&, std::span<const FfnGroup>, FfnWorkspace&,
                     float*);

  int64_t max_rows_ = 0;
  base::Array<float> gate_;    // [max_rows, intermediate]
  base::Array<float> up_;      // [max_rows, intermediate]
  base::Array<int8_t> codes_;  // down's input, [max_rows, CodeStride(intermediate)]
  base::Array<float> scales_;  // [max_rows]
  base::Array<int32_t> sums_;  // [max_rows]
  std::vector<kernels::TernaryGroup> groups_;
};

// From the first products to the input of the last: out [rows, intermediate] is
// quantize(norm(act(gate) * up)). `gate` [rows, intermediate] is overwritten.
void ActivateFfn(const kernels::Kernels& kernels, kernels::Executor& executor,
                 const FfnConfig& config, float* gate, const float* up,
                 const kernels::QuantizedRows& out);

// y [x.num_rows, hidden] = each group's feed-forward of its rows of x. Groups cover disjoint rows;
// x.num_rows <= workspace.max_rows().
void RunFfn(const kernels::Kernels& kernels, kernels::Executor& executor, const FfnConfig& config,
            const kernels::QuantizedRows& x, std::span<const FfnGroup> groups,
            FfnWorkspace& workspace, float* y);

}  // namespace ternion::experts
