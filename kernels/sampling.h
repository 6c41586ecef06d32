// How a token is drawn from logits, so that every order of work gives the same one: for host and
// device. Probabilities are within 2^-16 of softmax's, relatively.
//
// A token's rank is how far its logit is below the largest, in 2^-16ths of the temperature; its
// weight is e^-(rank / 2^16) as an integer, in units of 2^-40. From kNumRanks on a weight would be
// 0: such tokens, and NaN, are never drawn. Candidates are ordered by rank, then id. Sums of
// weights are exact: those of kMaxVocab tokens stay below 2^63.
#pragma once

#include <cstdint>

namespace ternion::kernels {

inline constexpr int32_t kRankUnit = 1 << 16;
inline constexpr int32_t kNumRanks = 28 * kRankUnit;
inline constexpr float kWeightUnit = 0x1p-40f;
inline constexpr int64_t kMaxVocab = int64_t{1} << 22;

// Ranks are counted in coarse bins, then those of one bin one by one.
inline constexpr int32_t kRanksOfBin = 1 << 10;
inline constexpr int32_t kNumBins = kNumRanks / kRanksOfBin;

// -1: never drawn. `largest` is the largest logit that is a number.
constexpr int32_t RankOf(float logit, float largest, float temperature) {
  constexpr float kFar = kNumRanks / kRankUnit;
  const float distance = (largest - logit) / temperature;
  const float bounded = distance < kFar ? distance : kFar;  // of NaN, too
  const auto rank = static_cast<int32_t>(bounded * kRankUnit);
  return logit == largest ? 0 : rank < kNumRanks ? rank : -1;
}

// x such that the weight is e^x / kWeightUnit, rounded down.
constexpr float ExponentOf(int32_t rank) { return static_cast<float>(rank) * (-1.0f / kRankUnit); }

// Which candidates are kept: those of a lower rank, and the first `ties` of this one.
struct RankCut {  // lies in shared memory, which nobody initializes
  int32_t rank;
  int64_t ties;
  uint64_t weight;  // of all that are kept

  constexpr bool Keeps(int32_t of_token) const { return of_token >= 0 && of_token < rank; }
};

// Where in a row of bins something is reached, and what comes before.
struct BinPlace {
  int32_t bin;
  int64_t count;
  uint64_t weight;
};

// What top_p asks for, of the weight that top_k keeps: at least one token's.
constexpr uint64_t WantedWeight(float top_p, uint64_t weight) {
  if (top_p >= 1) return weight;
  const auto wanted =
      static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(weight));
  return wanted > 0 ? wanted : 1;
}

}  // namespace ternion::kernels
