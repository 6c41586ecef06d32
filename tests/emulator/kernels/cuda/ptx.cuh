// Stands in for kernels/cuda/ptx.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ternion::kernels {
namespace {

inline void MultiplyTile(const uint32_t (&a)[4], const uint32_t (&b)[2], int32_t (&d)[4]) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = emulator::ExchangeWords(own);  // [thread][a, b]
  const int g = emulator::LaneOfThread() / 4, q = emulator::LaneOfThread() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * q + i % 2;
    for (int k = 0; k < 4; ++k) {  // quads: of A's row and of B's column
      const uint32_t* row = all[4 * g + k];
      const uint32_t* of_b = all[4 * column + k];
      d[i] = __dp4a(static_cast<int>(row[i / 2]), static_cast<int>(of_b[4]), d[i]);
      d[i] = __dp4a(static_cast<int>(row[i / 2 + 2]), static_cast<int>(of_b[5]), d[i]);
    }
  }
}

}  // namespace
}  // namespace ternion::kernels
