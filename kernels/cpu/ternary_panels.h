// The ternary product as the CPU variants see it: some outputs of one group, for one thread.
//
// Plain data and function declarations only: this is all that files compiled for one instruction
// set include (see variants.h).
#pragma once

#include <cstdint>

namespace ternion::kernels {

struct TernaryRun {
  const uint8_t* codes;  // panels: the run's first; rows: the run's first line; columns: line 0,
                         // where the run's outputs begin
  int64_t stride_bytes;  // of a panel or a line
  int64_t num_blocks;    // 16 input columns each
  int64_t num_outputs;   // output rows of the run; only the last panel may be partial
  float weight_scale;
  const int8_t* x;  // [num_rows, x_stride], at least 16 * num_blocks columns
  int64_t x_stride;
  const float* x_scales;  // [num_rows]
  const int32_t* x_sums;  // [num_rows]
  int64_t num_rows;
  float* y;  // [num_rows, y_stride], columns 0 .. num_outputs are written
  int64_t y_stride;
  const float* gate;  // [num_rows, y_stride] or null, see TernaryGroup
  uint8_t* scratch;   // base::kScratchBytesPerThread, 64-byte aligned
};

// A thread's share of a matrix of kColumns is a multiple of a line of 64 bytes, which ColumnBlocks
// transposes whole; up to kMaxNarrowRows rows do without that and may have a quarter of it.
constexpr int64_t kLineOutputs = 256;
constexpr int64_t kNarrowOutputs = kLineOutputs / 4;
constexpr int64_t kMaxNarrowRows = 8;

// RunPanels, RunRows, RunColumns: the product, by layout. DotLoop: the variant's 8-bit dot product
// alone, from registers to registers, for measuring the peak; returns the number of
// multiply-accumulates.
namespace scalar {
void RunPanels(const TernaryRun& run);
void RunRows(const TernaryRun& run);
void RunColumns(const TernaryRun& run);
}  // namespace scalar

namespace avx2 {
void RunPanels(const TernaryRun& run);
void RunRows(const TernaryRun& run);
void RunColumns(const TernaryRun& run);
int64_t DotLoop(int64_t iterations);
}  // namespace avx2

namespace avxvnni {
void RunPanels(const TernaryRun& run);
void RunRows(const TernaryRun& run);
void RunColumns(const TernaryRun& run);
int64_t DotLoop(int64_t iterations);
}  // namespace avxvnni

namespace avx512vnni {
void RunPanels(const TernaryRun& run);
void RunRows(const TernaryRun& run);
void RunColumns(const TernaryRun& run);
int64_t DotLoop(int64_t iterations);
}  // namespace avx512vnni

}  // namespace ternion::kernels
