// What products with matrices whose codes lie in lines share: an output's line (kRows:
// ternary_rows.h) or an input's (kColumns: ternary_columns.h). Lines that add nothing to any row of
// the call are skipped: products walk a list of the others.
//
// Vec is a vector of 2 or 4 lanes of 128 bits and how the variant multiplies with it, a type of
// internal linkage of one ternary_<variant>.cc:
//
//   Field<k>(v, f)       2-bit field f of every byte, worth 4^(f % k) when fields may stay in place
//   Dot(sum, codes, x)   sum += four codes times four activations, in every dword
//   kMaxSums             so many Dots fit into a sum
//   Total<k>(sum, f)     int32 lanes of a sum over fields f, worth 1 again
//   SumEach(v)           the sum of all lanes of each of four vectors
//   kRegisterSums        sums that registers hold
//   kLineRows            so many rows or less take lines of outputs as they lie
//   kMaxColumnRows       for more rows, turning columns into panels pays
//
// Included by files compiled for one instruction set: no std::, nothing inline from other headers.
#pragma once

#include "kernels/cpu/ternary_blocking.h"

namespace ternion::kernels {

constexpr int kAllLive = 0xffff;     // bits of 16 lines
constexpr int64_t kListedRows = 64;  // of activations: with more, hardly a line adds nothing

}  // namespace ternion::kernels
