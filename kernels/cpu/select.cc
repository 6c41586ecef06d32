#include "kernels/select.h"

#include <cstring>

#include "kernels/cpu/variants.h"

namespace ternion::kernels {
namespace {

constexpr int kNumVariants = 4;

const char* NothingToWaitFor(Executor&) { return nullptr; }

Kernels Table(const char* name, const Kernels& float_ops,
              void (*ternary_matmul)(const TernaryMatmulArgs&, Executor&)) {
  Kernels table = float_ops;
  table.name = name;
  table.skips_lines = true;
  table.wait = NothingToWaitFor;
  table.ternary_matmul = ternary_matmul;
  return table;
}

// Slowest first.
const Kernels& Variant(int i) {
  static const Kernels tables[kNumVariants] = {
      Table("scalar", scalar::kFloatOps, scalar::TernaryMatmul),
      Table("avx2", avx2::kFloatOps, avx2::TernaryMatmul),
      Table("avxvnni", avx2::kFloatOps, avxvnni::TernaryMatmul),
      Table("avx512vnni", avx512vnni::kFloatOps, avx512vnni::TernaryMatmul),
  };
  return tables[i];
}

// Whether CPU and operating system (which must save the wider registers) can run variant i.
bool CanRun(int i) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (i) {
    case 0:
      return true;
    case 1:
      return avx2;
    case 2:
      return avx2 && __builtin_cpu_supports("avxvnni");
    default:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
  }
}

struct Available {
  const char* names[kNumVariants];
  const Kernels* tables[kNumVariants];
  size_t count = 0;

  Available() {
    for (int i = 0; i < kNumVariants; ++i) {
      if (!CanRun(i)) continue;
      names[count] = Variant(i).name;
      tables[count++] = &Variant(i);
    }
  }
};

const Available& GetAvailable() {
  static const Available available;
  return available;
}

}  // namespace

std::span<const char* const> AvailableIsas() {
  return {GetAvailable().names, GetAvailable().count};
}

const Kernels* SelectCpuKernels(const std::string& isa) {
  const Available& available = GetAvailable();
  if (isa.empty()) return available.tables[available.count - 1];
  for (size_t i = 0; i < available.count; ++i) {
    if (isa == available.names[i]) return available.tables[i];
  }
  return nullptr;
}

}  // namespace ternion::kernels
