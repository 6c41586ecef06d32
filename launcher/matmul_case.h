// One ternary matmul to be measured, and random operands for it.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace ternion::launcher {

// A matrix times `tokens` rows, or tokens sent to `top_k` of `num_experts` matrices each.
struct MatmulCase {
  int64_t outputs = 0;
  int64_t inputs = 0;
  int64_t tokens = 0;
  int num_experts = 1;
  int top_k = 1;

  int64_t rows() const { return tokens * top_k; }
  int64_t products() const { return rows() * outputs * inputs; }
  std::string Name() const;  // "768 x 2048, top 8 of 128"
};

// Every token goes to top_k different experts, all equally likely: rows of each expert.
std::vector<int64_t> RandomRowsPerExpert(const MatmulCase& c, std::mt19937_64& rng);

// Random codes 0, 1, 2 of two bits, 1 twice as likely as the others.
void FillWithCodes(std::span<uint64_t> words, uint64_t seed);

// Random bf16 numbers, four in a word, of magnitudes from 2^-7 to 2^-3.
void FillWithBf16(std::span<uint64_t> words, uint64_t seed);

}  // namespace ternion::launcher
