// What this machine can do, measured now, so that a figure can stand beside its limit.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/thread_pool.h"

namespace ternion::kernels {

// Bytes per second at which all threads together read `memory` once, each its own contiguous part.
// For the speed of memory it must be several times larger than the last cache, and every page must
// have been written (untouched pages are all the same page of zeros).
double ReadBandwidth(std::span<const uint8_t> memory, base::ThreadPool& threads);

// 8-bit multiply-accumulates per second of all threads together, when the variant's dot product
// instruction (for avx2: maddubs and a 16-bit add) does nothing but go from registers to registers.
// One measurement takes a few milliseconds. 0 for "scalar", whose speed is up to the compiler.
double DotPeak(const std::string& isa, base::ThreadPool& threads);

}  // namespace ternion::kernels
