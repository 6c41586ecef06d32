// Weights and rows for tests of the ternary product on devices.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/ternary.h"

namespace ternion::kernels {

// The same weights as a CPU takes them and as the device does.
struct Weights {
  OwnedTernaryMatrix panels, tiles;

  Weights(int64_t rows, int64_t columns, float scale, TernaryLayout layout, std::mt19937& random)
      : panels(MakeTernaryMatrix(rows, columns, scale)),
        tiles(MakeTernaryMatrix(rows, columns, scale, layout)) {
    std::vector<int8_t> weights(rows * columns);
    for (int8_t& w : weights) w = static_cast<int8_t>(static_cast<int>(random() % 3) - 1);
    PackTernary(weights.data(), 0, rows, panels);
    PackTernary(weights.data(), 0, rows, tiles);
  }
};

// All codes there are; behind dim they are 0.
inline QuantizedBuffer RandomRows(int64_t num_rows, int64_t dim, std::mt19937& random) {
  QuantizedBuffer buffer(std::max<int64_t>(num_rows, 1), dim);
  const QuantizedRows x = buffer.rows(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    x.scales[r] = 0.001f * static_cast<float>(1 + random() % 1000);
    for (int64_t c = 0; c < dim; ++c) {
      x.codes[r * x.stride + c] = static_cast<int8_t>(random());
      x.sums[r] += x.codes[r * x.stride + c];
    }
  }
  return buffer;
}

}  // namespace ternion::kernels
