// Stands in for kernels/cuda/ptx.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tests/emulator/async.h"

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

inline void AwaitOpsBefore() { emulator::AwaitOpsBefore(); }

template <int bytes>
void StartCopy(const void* from, void* to) {
  emulator::StartCopy(from, to, bytes);
}
inline void EndCopies() { emulator::EndCopies(); }
template <int left>
void WaitForCopies() {
  emulator::WaitForCopies(left);
}
inline uint32_t WarpMax(uint32_t value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, value, distance);
    value = other > value ? other : value;
  }
  return value;
}
inline void PrefetchLine(const void*) {}

inline bool HasWarpgroups() { return emulator::HasWarpgroups(); }
inline void ShowSharedToProducts() { emulator::ShowSharedToProducts(); }
inline void BeginProducts(uint32_t (&)[2][4]) { emulator::BeginProducts(); }
inline void EndProducts() { emulator::EndProducts(); }
template <int left>
void WaitForProducts() {
  emulator::WaitForProducts(left);
}
template <int N>
void MultiplyWarpgroup(const uint32_t (&a)[4], uint64_t b, int32_t (&d)[N / 8][4]) {
  emulator::StartProduct(a, b, &d[0][0], N);
}

}  // namespace
}  // namespace ternion::kernels
