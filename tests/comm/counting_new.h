// Counts calls of operator new and aligned_alloc in a test binary that links counting_new.cc.
#pragma once

#include <cstdint>

namespace ternion::comm {

int64_t NumAllocations();

}  // namespace ternion::comm
