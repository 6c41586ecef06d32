#include "launcher/matmul_case.h"

#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"

namespace ternion::launcher {

std::string MatmulCase::Name() const {
  std::string name = absl::StrCat(outputs, " x ", inputs);
  if (num_experts > 1) absl::StrAppend(&name, ", top ", top_k, " of ", num_experts);
  return name;
}

std::vector<int64_t> RandomRowsPerExpert(const MatmulCase& c, std::mt19937_64& rng) {
  std::vector<int64_t> rows(c.num_experts);
  std::vector<int> experts(c.num_experts);
  std::iota(experts.begin(), experts.end(), 0);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int i = 0; i < c.top_k; ++i) {
      std::swap(experts[i], experts[i + rng() % (experts.size() - i)]);
      ++rows[experts[i]];
    }
  }
  return rows;
}

void FillWithCodes(std::span<uint64_t> words, uint64_t seed) {
  std::mt19937_64 rng(seed);
  for (uint64_t& word : words) {
    const uint64_t bits = rng();
    word = bits & ~(bits << 1 & 0xaaaaaaaaaaaaaaaa);  // 3 becomes 1
  }
}

void FillWithBf16(std::span<uint64_t> words, uint64_t seed) {
  std::mt19937_64 rng(seed);
  // Signs, the last two bits of exponents (120 to 123, where 127 is of 1) and mantissas.
  for (uint64_t& word : words) word = (rng() & 0x81ff81ff81ff81ff) | 0x3c003c003c003c00;
}

}  // namespace ternion::launcher
