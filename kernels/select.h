// Which table of kernels this process uses. Decided once, at start.
#pragma once

#include <span>
#include <string>

#include "kernels/kernels.h"

namespace ternion::kernels {

// Names of the CPU variants this machine can run, slowest first; the first is "scalar".
std::span<const char* const> AvailableIsas();

// The variant named `isa`, or the fastest one this machine can run when `isa` is empty (callers
// pass the TERNION_ISA environment variable). Null when the name is unknown or this machine lacks
// it.
const Kernels* SelectCpuKernels(const std::string& isa);

// The CUDA table, and the executor's stream and memories on the `device`-th of this machine's GPUs
// (counted round). Null with `*why` set ("this build has no CUDA kernels", "no device found").
const Kernels* SelectCudaKernels(int device, Executor& executor, std::string* why);

}  // namespace ternion::kernels
