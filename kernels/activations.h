// Quantized activation rows.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "base/checked.h"

namespace ternion::kernels {

// Rows of signed 8-bit codes, one scale per row: x[r][c] = codes[r][c] * scales[r]. int4 rows
// (codes in -8..7) are held widened to one byte each; only the wire packs them. A view.
struct QuantizedRows {
  int8_t* codes = nullptr;  // [num_rows, stride]; columns dim .. stride are 0
  float* scales = nullptr;  // [num_rows], what one code is worth
  int32_t* sums = nullptr;  // [num_rows], sum of the row's codes
  int64_t num_rows = 0;
  int64_t dim = 0;
  int64_t stride = 0;  // bytes between rows, CodeStride(dim)

  QuantizedRows Slice(int64_t begin, int64_t count) const {
    return {codes + begin * stride, scales + begin, sums + begin, count, dim, stride};
  }
};

// A multiple of 64 whose number of cache lines is odd: equal columns of neighbouring rows then fall
// into different cache sets, also when dim is a power of two.
constexpr int64_t CodeStride(int64_t dim) { return (base::CeilDiv(dim, 64) | 1) * 64; }

// QuantizedRows with their memory. Capacity is fixed; `rows(n)` views the first n.
class QuantizedBuffer {
 public:
  QuantizedBuffer() = default;
  QuantizedBuffer(int64_t max_rows, int64_t dim, base::Memory& memory = base::HostMemory())
      : QuantizedBuffer(max_rows, dim, memory, memory) {}
  // For a host that reads the scales.
  QuantizedBuffer(int64_t max_rows, int64_t dim, base::Memory& memory, base::Memory& of_scales)
      : codes_(max_rows * CodeStride(dim), memory),
        scales_(max_rows, of_scales),
        sums_(max_rows, memory),
        dim_(dim) {}

  QuantizedRows rows(int64_t num_rows) {
    return {codes_.data(), scales_.data(), sums_.data(), num_rows, dim_, CodeStride(dim_)};
  }
  int64_t max_rows() const { return static_cast<int64_t>(scales_.size()); }

 private:
  base::Array<int8_t> codes_;
  base::Array<float> scales_;
  base::Array<int32_t> sums_;
  int64_t dim_ = 0;
};

}  // namespace ternion::kernels
