// The reference: every output on its own, straight from the layouts in kernels/ternary.h.

#include "kernels/cpu/ternary_panels.h"
#include "kernels/ternary.h"

namespace ternion::kernels::scalar {
namespace {

int Code(const uint8_t* granule, int64_t place) {
  return granule[place % kGranuleBytes] >> (place / kGranuleBytes * 2) & 3;
}

// sum_k code_k x_k for one output row, whose granules are `step` bytes apart.
int32_t Dot(const uint8_t* granule, int64_t step, int64_t num_blocks, const int8_t* x) {
  int32_t sum = 0;
  for (int64_t b = 0; b < num_blocks; ++b, granule += step) {
    for (int place = 0; place < kGranuleCodes; ++place) {
      sum += Code(granule, place) * x[b * kBlockColumns + place];
    }
  }
  return sum;
}

// The same from columns, for the output at `place` of the granules at `granule` of each line.
int32_t DotColumns(const TernaryRun& run, const uint8_t* granule, int64_t place, const int8_t* x) {
  int32_t sum = 0;
  for (int64_t k = 0; k < run.num_blocks * kBlockColumns; ++k) {
    if (x[k] != 0) sum += Code(granule + k * run.stride_bytes, place) * x[k];
  }
  return sum;
}

void Store(const TernaryRun& run, int64_t row, int64_t output, int32_t dot) {
  run.y[row * run.y_stride + output] =
      static_cast<float>(dot - run.x_sums[row]) * (run.weight_scale * run.x_scales[row]);
}

}  // namespace

void RunPanels(const TernaryRun& run) {
  for (int64_t o = 0; o < run.num_outputs; ++o) {
    const uint8_t* granule =
        run.codes + o / kPanelRows * run.stride_bytes + o % kPanelRows * kGranuleBytes;
    for (int64_t r = 0; r < run.num_rows; ++r) {
      Store(run, r, o, Dot(granule, kBlockBytes, run.num_blocks, run.x + r * run.x_stride));
    }
  }
}

void RunRows(const TernaryRun& run) {
  for (int64_t o = 0; o < run.num_outputs; ++o) {
    const uint8_t* line = run.codes + o * run.stride_bytes;
    for (int64_t r = 0; r < run.num_rows; ++r) {
      if (run.gate != nullptr && run.gate[r * run.y_stride + o] <= 0) continue;
      Store(run, r, o, Dot(line, kGranuleBytes, run.num_blocks, run.x + r * run.x_stride));
    }
  }
}

void RunColumns(const TernaryRun& run) {
  for (int64_t o = 0; o < run.num_outputs; ++o) {
    const uint8_t* granule = run.codes + o / kGranuleCodes * kGranuleBytes;
    for (int64_t r = 0; r < run.num_rows; ++r) {
      const int8_t* x = run.x + r * run.x_stride;
      Store(run, r, o, DotColumns(run, granule, o % kGranuleCodes, x));
    }
  }
}

}  // namespace ternion::kernels::scalar
