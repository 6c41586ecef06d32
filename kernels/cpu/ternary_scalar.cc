// The reference: every output on its own, straight from the layout in kernels/ternary.h.

#include "kernels/cpu/ternary_panels.h"
#include "kernels/ternary.h"

namespace ternion::kernels::scalar {
namespace {

// sum_k code_k x_k for one output row of a panel.
int32_t Dot(const uint8_t* panel, int64_t num_blocks, int64_t row, const int8_t* x) {
  int32_t sum = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const uint8_t* bytes = panel + b * kBlockBytes + 4 * row;
    for (int column = 0; column < kBlockColumns; ++column) {
      const int code = bytes[column % 4] >> (column / 4 * 2) & 3;
      sum += code * x[b * kBlockColumns + column];
    }
  }
  return sum;
}

}  // namespace

void RunPanels(const PanelRun& run) {
  for (int64_t o = 0; o < run.num_outputs; ++o) {
    const uint8_t* panel = run.codes + o / kPanelRows * run.num_blocks * kBlockBytes;
    for (int64_t r = 0; r < run.num_rows; ++r) {
      const int32_t dot = Dot(panel, run.num_blocks, o % kPanelRows, run.x + r * run.x_stride);
      run.y[r * run.y_stride + o] =
          static_cast<float>(dot - run.x_sums[r]) * (run.weight_scale * run.x_scales[r]);
    }
  }
}

}  // namespace ternion::kernels::scalar
