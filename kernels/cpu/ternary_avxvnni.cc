// Ternary product with 256-bit dpbusd (AVX-VNNI: processors without AVX-512).

#include "kernels/cpu/ternary_256.h"

namespace ternion::kernels::avxvnni {
namespace {

struct Instr {
  static constexpr int kRows = 6;
  static constexpr int kMaxColumnRows = 48;
  static constexpr int kMaxSums = 1 << 30;  // int32 already

  static __m256i Add(__m256i partial, __m256i codes, __m256i four) {
    return _mm256_dpbusd_avx_epi32(partial, codes, four);
  }
  static __m256i Widen(__m256i partial) { return partial; }
};

}  // namespace

void RunPanels(const TernaryRun& run) { RunPanelsWith<Micro256<Instr>>(run); }
void RunRows(const TernaryRun& run) { RunRowsWith<Micro256<Instr>, Vec256<Instr>>(run); }
void RunColumns(const TernaryRun& run) { RunColumnsWith<Micro256<Instr>, Vec256<Instr>>(run); }

int64_t DotLoop(int64_t iterations) { return DotLoop256<Instr>(iterations); }

}  // namespace ternion::kernels::avxvnni
