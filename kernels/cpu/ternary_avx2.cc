// Ternary product with AVX2: maddubs, summed in int16 while that cannot overflow.

#include "kernels/cpu/ternary_256.h"

namespace ternion::kernels::avx2 {
namespace {

struct Instr {
  static constexpr int kRows = 4;
  static constexpr int kMaxColumnRows = 8;
  // A maddubs of codes 0..2 and activations -128..127 lies in -512..508; 64 of them in
  // -32768..32512.
  static constexpr int kMaxSums = 64;

  static __m256i Add(__m256i partial, __m256i codes, __m256i four) {
    return _mm256_add_epi16(partial, _mm256_maddubs_epi16(codes, four));
  }
  static __m256i Widen(__m256i partial) { return _mm256_madd_epi16(partial, _mm256_set1_epi16(1)); }
};

}  // namespace

void RunPanels(const TernaryRun& run) { RunPanelsWith<Micro256<Instr>>(run); }
void RunRows(const TernaryRun& run) { RunRowsWith<Micro256<Instr>, Vec256<Instr>>(run); }
void RunColumns(const TernaryRun& run) { RunColumnsWith<Micro256<Instr>, Vec256<Instr>>(run); }

int64_t DotLoop(int64_t iterations) { return DotLoop256<Instr>(iterations); }

}  // namespace ternion::kernels::avx2
