// CHECK for our own bugs; free of Abseil, so that kernels and .cu files may use it.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace ternion::base {

[[noreturn]] inline void CheckFailed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: bug: CHECK failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace ternion::base

#define TERNION_CHECK(condition)      \
  ((condition) ? static_cast<void>(0) \
               : ::ternion::base::CheckFailed(#condition, __FILE__, __LINE__))
