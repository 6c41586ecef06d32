// The ternary product as the CPU variants see it: a run of panels of one group, for one thread.
//
// Plain data and function declarations only: this is all that files compiled for one instruction
// set include (see variants.h).
#pragma once

#include <cstdint>

namespace ternion::kernels {

struct PanelRun {
  const uint8_t* codes;  // consecutive panels
  int64_t num_blocks;    // 64-byte blocks in a panel
  int64_t num_outputs;   // output rows of the run; only the last panel may be partial
  float weight_scale;
  const int8_t* x;  // [num_rows, x_stride], at least 16 * num_blocks columns
  int64_t x_stride;
  const float* x_scales;  // [num_rows]
  const int32_t* x_sums;  // [num_rows]
  int64_t num_rows;
  float* y;  // [num_rows, y_stride], columns 0 .. num_outputs are written
  int64_t y_stride;
  uint8_t* scratch;  // base::kScratchBytesPerThread, 64-byte aligned
};

// RunPanels: the product. DotLoop: the variant's 8-bit dot product alone, from registers to
// registers, for measuring the peak; returns the number of multiply-accumulates.
namespace scalar {
void RunPanels(const PanelRun& run);
}  // namespace scalar

namespace avx2 {
void RunPanels(const PanelRun& run);
int64_t DotLoop(int64_t iterations);
}  // namespace avx2

namespace avxvnni {
void RunPanels(const PanelRun& run);
int64_t DotLoop(int64_t iterations);
}  // namespace avxvnni

namespace avx512vnni {
void RunPanels(const PanelRun& run);
int64_t DotLoop(int64_t iterations);
}  // namespace avx512vnni

}  // namespace ternion::kernels
