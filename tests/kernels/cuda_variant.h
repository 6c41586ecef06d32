// The CUDA ops as one more variant to hold against the CPU's.
#pragma once

#include "kernels/kernels.h"

namespace ternion::kernels {

// A table whose ops work on any memory of this process and are done when they return; null where
// there is none. Sets the executor up for it.
const Kernels* CudaVariant(Executor& executor);

// Whether products are by warpgroups from now on, or by warps, as wanted: a real device has its
// way.
bool UseWarpgroups(bool wanted);

}  // namespace ternion::kernels
