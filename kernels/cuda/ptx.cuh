// Instructions that CUDA C++ has no name for.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ternion::kernels {
namespace {

// d += A B by a warp, A [16, 32] and B [32, 8] of s8, d of s32 (PTX ISA, mma.m16n8k32). Thread t
// has, with g = t / 4 and q = t % 4: of A, a[0] row g and a[1] row g + 8, columns 4q .. 4q + 3,
// a[2] and a[3] the same from column 16 + 4q; of B, b[0] and b[1] likewise, column g; of d, d[0]
// and d[1] row g, columns 2q and 2q + 1, d[2] and d[3] row g + 8.
__device__ __forceinline__ void MultiplyTile(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             int32_t (&d)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // of the same words, in quarters (mma.m8n8k16)
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int rows = quarter % 2, columns = quarter / 2;
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d[2 * rows]), "+r"(d[2 * rows + 1])
        : "r"(a[quarter]), "r"(b[columns]));
  }
#endif
}

// ---- Ops one after the other (PTX ISA, griddepcontrol)

// What each kernel does first: until all ops before are done and what they wrote is seen. Blocks of
// the next op may start from here on, and wait here in turn. Before it only what no op writes may
// be touched.
__device__ __forceinline__ void AwaitOpsBefore() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Copies from memory to shared memory, which go on by themselves

// Of 8 or 16 bytes, aligned to as many. `to` holds anything until WaitForCopies.
template <int bytes>
__device__ __forceinline__ void StartCopy(const void* from, void* to) {
  static_assert(bytes == 8 || bytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // done at once
  using Piece = std::conditional_t<bytes == 16, uint4, uint2>;
  *static_cast<Piece*>(to) = *static_cast<const Piece*>(from);
#else
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from) : "memory");
  }
#endif
}
// Makes one group of all copies since the last.
__device__ __forceinline__ void EndCopies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until no more than the last `left` groups of this thread are not done.
template <int left>
__device__ __forceinline__ void WaitForCopies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

// The largest value of a warp's threads, for all of them.
__device__ __forceinline__ uint32_t WarpMax(uint32_t value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, value);
#else
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, value, distance);
    value = other > value ? other : value;
  }
  return value;
#endif
}

// Brings the line that holds `data` closer, to where all blocks share it.
__device__ __forceinline__ void PrefetchLine(const void* data) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
}

// ---- Products of a warpgroup, four warps, which go on while its threads do something else
//
// A product may still read its operands and write its sums until WaitForProducts: meanwhile no
// thread touches these registers, nor changes that shared memory.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ bool HasWarpgroups() { return true; }

// What this thread wrote to shared memory, or copied there, is what products see behind the next
// barrier.
__device__ __forceinline__ void ShowSharedToProducts() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Comes before products, which take `a` as it is here.
__device__ __forceinline__ void BeginProducts(uint32_t (&a)[2][4]) {
  asm volatile("wgmma.fence.sync.aligned;"
               : "+r"(a[0][0]), "+r"(a[0][1]), "+r"(a[0][2]), "+r"(a[0][3]), "+r"(a[1][0]),
                 "+r"(a[1][1]), "+r"(a[1][2]), "+r"(a[1][3])
               :
               : "memory");
}
// Makes one group of all products since the last.
__device__ __forceinline__ void EndProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until no more than the last `left` groups are not done.
template <int left>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

#define TERNION_SUMS(n) "+r"(d[n][0]), "+r"(d[n][1]), "+r"(d[n][2]), "+r"(d[n][3])
#define TERNION_SUMS_4(n) \
  TERNION_SUMS(n), TERNION_SUMS(n + 1), TERNION_SUMS(n + 2), TERNION_SUMS(n + 3)
#define TERNION_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TERNION_32 \
  TERNION_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TERNION_48 \
  TERNION_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TERNION_64 \
  TERNION_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TERNION_WGMMA(shape, sums, rest, ...)                                              \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".s32.s8.s8 {" sums "}, " rest ", 1;" \
               : __VA_ARGS__                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d += A B, A [64, 32] and B [32, N]. Warp w of the four has rows 16w .. 16w + 15 of A and d, of
// which its threads have what they have in MultiplyTile, d[n] for columns 8n .. 8n + 7. B is in
// shared memory (SharedOperand).
template <int N>
__device__ __forceinline__ void MultiplyWarpgroup(const uint32_t (&a)[4], uint64_t b,
                                                  int32_t (&d)[N / 8][4]) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128);
  if constexpr (N == 32) {
    TERNION_WGMMA("m64n32k32", TERNION_16, "{%16, %17, %18, %19}, %20", TERNION_SUMS_4(0));
  } else if constexpr (N == 64) {
    TERNION_WGMMA("m64n64k32", TERNION_32, "{%32, %33, %34, %35}, %36", TERNION_SUMS_4(0),
                  TERNION_SUMS_4(4));
  } else if constexpr (N == 96) {
    TERNION_WGMMA("m64n96k32", TERNION_48, "{%48, %49, %50, %51}, %52", TERNION_SUMS_4(0),
                  TERNION_SUMS_4(4), TERNION_SUMS_4(8));
  } else {
    TERNION_WGMMA("m64n128k32", TERNION_64, "{%64, %65, %66, %67}, %68", TERNION_SUMS_4(0),
                  TERNION_SUMS_4(4), TERNION_SUMS_4(8), TERNION_SUMS_4(12));
  }
}

#undef TERNION_WGMMA
#undef TERNION_64
#undef TERNION_48
#undef TERNION_32
#undef TERNION_16
#undef TERNION_SUMS_4
#undef TERNION_SUMS

#else  // not a Hopper: products are done when they return

__device__ __forceinline__ bool HasWarpgroups() { return false; }
__device__ inline void ShowSharedToProducts() {}
__device__ inline void BeginProducts(uint32_t (&)[2][4]) {}
__device__ inline void EndProducts() {}
template <int left>
__device__ inline void WaitForProducts() {}
template <int N>
__device__ inline void MultiplyWarpgroup(const uint32_t (&)[4], uint64_t, int32_t (&)[N / 8][4]) {}

#endif

}  // namespace
}  // namespace ternion::kernels
