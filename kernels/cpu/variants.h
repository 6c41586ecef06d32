// Entry points of every CPU variant; select.cc makes the tables of kernels/kernels.h from them.
//
// A variant's arithmetic lives in files compiled with its own -m flags. Those files hold
// intrinsics, raw pointers and functions of internal linkage only: an inline function of a shared
// header (std::, base/) emitted there could be the copy that the linker keeps for machines without
// that instruction set.
#pragma once

#include "kernels/kernels.h"

namespace ternion::kernels {

namespace scalar {
extern const Kernels kFloatOps;  // every op but ternary_matmul
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor);
}  // namespace scalar

namespace avx2 {
extern const Kernels kFloatOps;  // every op but ternary_matmul
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor);
}  // namespace avx2

namespace avxvnni {  // float ops are those of avx2
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor);
}  // namespace avxvnni

namespace avx512vnni {
extern const Kernels kFloatOps;  // every op but ternary_matmul
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor);
}  // namespace avx512vnni

}  // namespace ternion::kernels
