// The next token (kernels/sampling.h).
#pragma once

#include "kernels/cpu/float_ops_common.inc.h"
#include "kernels/sampling.h"

namespace ternion::kernels {
namespace {

// The largest number, -infinity if there is none.
inline float LargestOf(const float* logits, int64_t vocab) {
  F32x16 top = Set1(-__builtin_inff());
  ForEachVector(vocab, [&](int64_t i, int64_t n) {
    top = Max(FirstN(LoadN(logits + i, n), n, Set1(-__builtin_inff())), top);
  });
  return MaxLane(top);
}

// Of equals the first.
inline int32_t ArgMax(const float* logits, int64_t vocab) {
  const float largest = LargestOf(logits, vocab);
  if (largest == -__builtin_inff()) return 0;
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) {
    if (MaxLane(Max(Load(logits + i), Set1(-__builtin_inff()))) == largest) break;
  }
  while (logits[i] != largest) ++i;
  return static_cast<int32_t>(i);
}

// Ranks of the n tokens from `logits` on; behind them -1. Returns the lowest, as unsigned.
inline uint32_t RanksOf(const float* logits, int64_t n, float largest, float temperature,
                        int32_t (&ranks)[kLanes]) {
  uint32_t lowest = ~0u;
  if (n == kLanes) {
    for (int l = 0; l < kLanes; ++l) ranks[l] = RankOf(logits[l], largest, temperature);
  } else {
    for (int l = 0; l < kLanes; ++l) {
      ranks[l] = l < n ? RankOf(logits[l], largest, temperature) : -1;
    }
  }
  for (const int32_t rank : ranks) {
    const auto place = static_cast<uint32_t>(rank);
    lowest = place < lowest ? place : lowest;
  }
  return lowest;
}

// f(token, rank) for all of ranks first .. last, in ascending id.
template <typename F>
inline void ForEachRank(const float* logits, int64_t vocab, float largest, float temperature,
                        int32_t first, int32_t last, F f) {
  ForEachVector(vocab, [&](int64_t begin, int64_t n) {
    int32_t ranks[kLanes];
    if (RanksOf(logits + begin, n, largest, temperature, ranks) > static_cast<uint32_t>(last)) {
      return;
    }
    for (int l = 0; l < kLanes; ++l) {
      if (ranks[l] >= first && ranks[l] <= last) f(static_cast<int32_t>(begin + l), ranks[l]);
    }
  });
}

// f(token, rank, weight) for all up to rank `last` that may be drawn, in ascending id, until it
// returns true.
template <typename F>
inline void ForEachWeight(const float* logits, int64_t vocab, float largest, float temperature,
                          int32_t last, F f) {
  for (int64_t begin = 0; begin < vocab; begin += kLanes) {
    int32_t ranks[kLanes];
    const int64_t n = vocab - begin < kLanes ? vocab - begin : kLanes;
    if (RanksOf(logits + begin, n, largest, temperature, ranks) > static_cast<uint32_t>(last)) {
      continue;
    }
    float exponents[kLanes], weights[kLanes];
    for (int l = 0; l < kLanes; ++l) exponents[l] = ExponentOf(ranks[l]);
    Store(Exp(Load(exponents)) / Set1(kWeightUnit), weights);
    for (int l = 0; l < kLanes; ++l) {
      if (ranks[l] < 0 || ranks[l] > last) continue;
      const auto token = static_cast<int32_t>(begin + l);
      if (f(token, ranks[l], static_cast<uint64_t>(weights[l]))) return;
    }
  }
}

inline uint64_t WeightOf(int32_t rank) {
  float weights[kLanes];
  Store(Exp(Set1(ExponentOf(rank))) / Set1(kWeightUnit), weights);
  return static_cast<uint64_t>(weights[0]);
}

// Of one row, in a thread's scratch.
struct RankCounts {
  int32_t counts[kNumBins];
  uint64_t weights[kNumBins];
  int32_t of_ranks[kRanksOfBin];  // of one bin
};

class Sampler {
 public:
  Sampler(const float* logits, int64_t vocab, const SampleParams& params, RankCounts& counts)
      : logits_(logits), vocab_(vocab), params_(params), counts_(counts) {}

  int32_t Draw() {
    if (!(params_.temperature > 0)) return ArgMax(logits_, vocab_);
    largest_ = LargestOf(logits_, vocab_);
    std::memset(&counts_, 0, sizeof(counts_));
    RankCut cut = {kNumRanks, 0, 0};
    int64_t candidates = 0;
    ForEachUpTo(kNumRanks, [&](int32_t, int32_t rank, uint64_t weight) {
      ++counts_.counts[rank / kRanksOfBin];
      counts_.weights[rank / kRanksOfBin] += weight;
      cut.weight += weight;
      ++candidates;
      return false;
    });
    if (candidates == 0) return 0;
    if (params_.top_k > 0 && params_.top_k < candidates) cut = CutAtCount(params_.top_k);
    const uint64_t wanted = WantedWeight(params_.top_p, cut.weight);
    if (wanted < cut.weight) cut = CutAtWeight(wanted);
    return Walk(cut);
  }

 private:
  template <typename F>
  void ForEachUpTo(int32_t last, F f) const {
    ForEachWeight(logits_, vocab_, largest_, params_.temperature, last, f);
  }

  void CountRanksOf(int32_t bin) {
    std::memset(counts_.of_ranks, 0, sizeof(counts_.of_ranks));
    ForEachRank(logits_, vocab_, largest_, params_.temperature, bin * kRanksOfBin,
                bin * kRanksOfBin + kRanksOfBin - 1,
                [&](int32_t, int32_t rank) { ++counts_.of_ranks[rank % kRanksOfBin]; });
  }

  // The first `count` candidates, of which there are more.
  RankCut CutAtCount(int64_t count) {
    BinPlace place = {};
    for (place.bin = 0; place.count + counts_.counts[place.bin] < count; ++place.bin) {
      place.count += counts_.counts[place.bin];
      place.weight += counts_.weights[place.bin];
    }
    CountRanksOf(place.bin);
    for (int32_t rank = place.bin * kRanksOfBin;; ++rank) {
      const int32_t here = counts_.of_ranks[rank % kRanksOfBin];
      const uint64_t weight = WeightOf(rank);
      if (place.count + here >= count) {
        const int64_t ties = count - place.count;
        return {rank, ties, place.weight + ties * weight};
      }
      place.count += here;
      place.weight += here * weight;
    }
  }

  // The first candidates that weigh `wanted`, of all that weigh more.
  RankCut CutAtWeight(uint64_t wanted) {
    BinPlace place = {};
    for (place.bin = 0; place.weight + counts_.weights[place.bin] < wanted; ++place.bin) {
      place.weight += counts_.weights[place.bin];
    }
    CountRanksOf(place.bin);
    for (int32_t rank = place.bin * kRanksOfBin;; ++rank) {
      const uint64_t weight = WeightOf(rank), here = counts_.of_ranks[rank % kRanksOfBin] * weight;
      if (place.weight + here >= wanted) {
        const int64_t ties = (wanted - place.weight + weight - 1) / weight;
        return {rank, ties, place.weight + ties * weight};
      }
      place.weight += here;
    }
  }

  int32_t Walk(const RankCut& cut) const {
    auto left =
        static_cast<uint64_t>(static_cast<unsigned __int128>(params_.random) * cut.weight >> 64);
    int64_t ties = cut.ties;
    int32_t drawn = 0;
    ForEachUpTo(cut.rank, [&](int32_t token, int32_t rank, uint64_t weight) {
      const bool kept = cut.Keeps(rank) || (rank == cut.rank && ties-- > 0);
      if (!kept) return false;
      if (left < weight) {
        drawn = token;
        return true;
      }
      left -= weight;
      return false;
    });
    return drawn;
  }

  const float* const logits_;
  const int64_t vocab_;
  const SampleParams params_;
  RankCounts& counts_;
  float largest_ = 0;
};

void Sample(const SampleArgs& args, Executor& executor) {
  static_assert(sizeof(RankCounts) <= base::kScratchBytesPerThread);
  executor.threads->ParallelFor(
      args.num_rows, MinUnits(4 * args.vocab), [&](int64_t begin, int64_t end, int thread) {
        auto& counts = *reinterpret_cast<RankCounts*>(executor.threads->scratch(thread));
        for (int64_t row = begin; row < end; ++row) {
          Sampler sampler(args.logits + row * args.vocab, args.vocab, args.params[row], counts);
          args.tokens[row] = sampler.Draw();
        }
      });
}

}  // namespace
}  // namespace ternion::kernels
