#include "kernels/cpu/limits.h"

#include <emmintrin.h>

#include <chrono>

#include "kernels/cpu/ternary_panels.h"

namespace ternion::kernels {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchBytes = 96 * kLineBytes;
constexpr int64_t kDotIterations = 200'000;

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Loads every byte of [begin, end), aligned to lines.
void ReadAll(const uint8_t* begin, const uint8_t* end) {
  __m128i sum[4] = {};
  for (const uint8_t* line = begin; line < end; line += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T0);
    for (int i = 0; i < 4; ++i) {
      sum[i] = _mm_or_si128(sum[i], _mm_load_si128(reinterpret_cast<const __m128i*>(line) + i));
    }
  }
  for (__m128i& part : sum) __asm__ volatile("" : "+x"(part));  // the loads are for nothing else
}

int64_t (*DotLoop(const std::string& isa))(int64_t) {
  if (isa == "avx2") return avx2::DotLoop;
  if (isa == "avxvnni") return avxvnni::DotLoop;
  if (isa == "avx512vnni") return avx512vnni::DotLoop;
  return nullptr;
}

}  // namespace

double ReadBandwidth(std::span<const uint8_t> memory, base::ThreadPool& threads) {
  const int64_t lines = static_cast<int64_t>(memory.size()) / kLineBytes;
  const auto start = std::chrono::steady_clock::now();
  threads.ParallelFor(lines, 1, [&](int64_t begin, int64_t end, int) {
    ReadAll(memory.data() + begin * kLineBytes, memory.data() + end * kLineBytes);
  });
  return static_cast<double>(lines * kLineBytes) / SecondsSince(start);
}

double DotPeak(const std::string& isa, base::ThreadPool& threads) {
  int64_t (*const loop)(int64_t) = DotLoop(isa);
  if (loop == nullptr) return 0;
  base::Array<int64_t> macs(threads.num_threads());
  const auto start = std::chrono::steady_clock::now();
  threads.Run([&](int thread) { macs[thread] = loop(kDotIterations); });
  const double seconds = SecondsSince(start);
  int64_t total = 0;
  for (int64_t count : macs.span()) total += count;
  return static_cast<double>(total) / seconds;
}

}  // namespace ternion::kernels
