// Instructions that CUDA C++ has no name for.
#pragma once

#include <cstdint>

namespace ternion::kernels {
namespace {

// d += A B by a warp, A [16, 32] and B [32, 8] of s8, d of s32 (PTX ISA, mma.m16n8k32). Thread t
// has, with g = t / 4 and q = t % 4: of A, a[0] row g and a[1] row g + 8, columns 4q .. 4q + 3,
// a[2] and a[3] the same from column 16 + 4q; of B, b[0] and b[1] likewise, column g; of d, d[0]
// and d[1] row g, columns 2q and 2q + 1, d[2] and d[3] row g + 8.
__device__ __forceinline__ void MultiplyTile(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             int32_t (&d)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace
}  // namespace ternion::kernels
