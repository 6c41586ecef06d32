// The next token (kernels/sampling.h): a block per row, whose passes over the logits count.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/variants.h"
#include "kernels/sampling.h"

namespace ternion::kernels {
namespace {

// ---- CUDA kernels

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / kWarp;

// Order-preserving; NaN is -infinity, and -0 is 0.
__device__ inline uint32_t KeyOf(float logit) {
  if (logit != logit) logit = -Infinity();
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float LogitOf(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffff : ~key);
}

template <typename T>
__device__ inline T WarpSum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

__device__ inline uint64_t WeightOf(int32_t rank) {
  return static_cast<uint64_t>(Exp(ExponentOf(rank)) / kWeightUnit);
}

struct SampleMemory {
  unsigned counts[kNumBins];
  unsigned long long weights[kNumBins];
  unsigned of_ranks[kRanksOfBin];  // of one bin
  RankCut cut;
  BinPlace place;
  uint64_t weight_of_warp[kSampleWarps];
  int64_t ties_of_warp[kSampleWarps];
};

struct Row {
  const float* logits;
  int64_t vocab;
  float largest;
  float temperature;

  __device__ int32_t Rank(int64_t token) const {
    return RankOf(logits[token], largest, temperature);
  }
};

// Largest logit's key, then the lowest of its ids, which is inverted.
__device__ inline uint64_t Best(const float* logits, int64_t vocab) {
  constexpr int kAtOnce = 8;  // loads under way
  uint64_t best = 0;
  const auto take = [&](int64_t i, float logit) {
    const uint64_t mine = uint64_t{KeyOf(logit)} << 32 | static_cast<uint32_t>(~i);
    best = mine > best ? mine : best;
  };
  const int64_t stride = int64_t{kAtOnce} * blockDim.x;
  const int64_t whole = vocab / stride * stride;
  for (int64_t first = threadIdx.x; first < whole; first += stride) {
    float some[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) some[j] = logits[first + int64_t{j} * blockDim.x];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) take(first + int64_t{j} * blockDim.x, some[j]);
  }
  for (int64_t i = whole + threadIdx.x; i < vocab; i += blockDim.x) take(i, logits[i]);
  return BlockReduce(best, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// By one warp: where, among `num` bins, enough(count, weight) of all bins up to and with that one
// begins to hold, from `from` on.
template <typename Bin, typename Enough>
__device__ inline BinPlace FindBin(int32_t num, BinPlace from, Bin bin, Enough enough) {
  const int lane = static_cast<int>(threadIdx.x);
  const int32_t share = (num + kWarp - 1) / kWarp;
  const int32_t begin = lane * share, end = begin + share < num ? begin + share : num;
  BinPlace mine = {};
  for (int32_t i = begin; i < end; ++i) {
    const BinPlace here = bin(i);
    mine.count += here.count;
    mine.weight += here.weight;
  }
  // All lanes follow the shares, then that lane its bins.
  int32_t in_lane = kWarp;
  for (int l = 0; l < kWarp; ++l) {
    const int64_t count = __shfl_sync(kFullWarp, mine.count, l);
    const uint64_t weight = __shfl_sync(kFullWarp, mine.weight, l);
    if (in_lane < kWarp) continue;
    if (enough(from.count + count, from.weight + weight)) {
      in_lane = l;
    } else {
      from.count += count;
      from.weight += weight;
    }
  }
  if (in_lane == kWarp) return from;
  for (from.bin = in_lane * share;; ++from.bin) {
    const BinPlace here = bin(from.bin);
    if (enough(from.count + here.count, from.weight + here.weight)) return from;
    from.count += here.count;
    from.weight += here.weight;
  }
}

// Keeps candidates up to where enough(count, weight) begins to hold; ties(place, weight of one)
// says how many of the last rank. Something is enough.
template <typename Enough, typename Ties>
__device__ inline void CutRow(const Row& row, SampleMemory& memory, Enough enough, Ties ties) {
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const auto bin = [&](int32_t i) {
      return BinPlace{0, static_cast<int64_t>(memory.counts[i]), memory.weights[i]};
    };
    const BinPlace place = FindBin(kNumBins, {}, bin, enough);
    if (threadIdx.x == 0) memory.place = place;
  }
  ForEach(kRanksOfBin, [&](int64_t i) { memory.of_ranks[i] = 0; });
  __syncthreads();
  const BinPlace coarse = memory.place;
  ForEach(row.vocab, [&](int64_t token) {
    const int32_t rank = row.Rank(token);
    if (rank >= 0 && rank / kRanksOfBin == coarse.bin) {
      atomicAdd(&memory.of_ranks[rank % kRanksOfBin], 1u);
    }
  });
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int32_t first = coarse.bin * kRanksOfBin;
    const auto bin = [&](int32_t i) {
      const auto count = static_cast<int64_t>(memory.of_ranks[i]);
      return BinPlace{0, count, count == 0 ? 0 : count * WeightOf(first + i)};
    };
    const BinPlace place = FindBin(kRanksOfBin, {0, coarse.count, coarse.weight}, bin, enough);
    const int32_t rank = first + place.bin;
    const uint64_t weight = WeightOf(rank);
    const int64_t kept = ties(place, weight);
    if (threadIdx.x == 0) memory.cut = {rank, kept, place.weight + kept * weight};
  }
  __syncthreads();
}

// Weight of the kept ones among tokens [begin, end), `ties` being left; by a warp. Takes from
// `ties` those of the last rank.
__device__ inline uint64_t KeptWeight(const Row& row, const RankCut& cut, int64_t begin,
                                      int64_t end, uint64_t tie_weight, int64_t& ties) {
  uint64_t weight = 0;
  int64_t tied = 0;
  for (int64_t token = begin + threadIdx.x % kWarp; token < end; token += kWarp) {
    const int32_t rank = row.Rank(token);
    if (cut.Keeps(rank)) weight += WeightOf(rank);
    tied += rank == cut.rank;
  }
  tied = WarpSum(tied);
  const int64_t taken = tied < ties ? tied : ties;
  ties -= taken;
  return WarpSum(weight) + taken * tie_weight;
}

// The token at `target` of the kept weight, in ascending id, for the first warp.
__device__ inline int32_t Walk(const Row& row, const RankCut& cut, uint64_t target,
                               SampleMemory& memory) {
  const uint64_t tie_weight = cut.ties > 0 ? WeightOf(cut.rank) : 0;
  const int warp = threadIdx.x / kWarp;
  const int64_t share = base::RoundUp(base::CeilDiv(row.vocab, kSampleWarps), int64_t{kWarp});
  const auto end_of = [&](int64_t begin, int64_t size) {
    return begin + size < row.vocab ? begin + size : row.vocab;
  };
  int64_t all_ties = row.vocab;
  const uint64_t untied =
      KeptWeight(row, cut, warp * share, end_of(warp * share, share), 0, all_ties);
  if (threadIdx.x % kWarp == 0) {
    memory.weight_of_warp[warp] = untied;
    memory.ties_of_warp[warp] = row.vocab - all_ties;
  }
  __syncthreads();
  if (warp != 0) return 0;
  int64_t ties = cut.ties, begin = 0;
  for (int w = 0; w < kSampleWarps; ++w) {
    const int64_t tied = memory.ties_of_warp[w], taken = tied < ties ? tied : ties;
    const uint64_t weight = memory.weight_of_warp[w] + taken * tie_weight;
    begin = w * share;
    if (target < weight) break;
    target -= weight;
    ties -= taken;
  }
  for (;; begin += kWarp) {
    int64_t left = ties;
    const uint64_t weight = KeptWeight(row, cut, begin, end_of(begin, kWarp), tie_weight, left);
    if (target < weight || begin + kWarp >= row.vocab) break;
    target -= weight;
    ties = left;
  }
  for (int64_t token = begin; token < end_of(begin, kWarp); ++token) {
    const int32_t rank = row.Rank(token);
    const bool kept = cut.Keeps(rank) || (rank == cut.rank && ties-- > 0);
    if (!kept) continue;
    const uint64_t weight = WeightOf(rank);
    if (target < weight) return static_cast<int32_t>(token);
    target -= weight;
  }
  return 0;
}

__global__ void __launch_bounds__(kSampleThreads) SampleKernel(SampleArgs args) {
  AwaitOpsBefore();
  __shared__ SampleMemory memory;
  const float* logits = args.logits + blockIdx.x * args.vocab;
  const SampleParams params = args.params[blockIdx.x];
  int32_t& token = args.tokens[blockIdx.x];
  const uint64_t best = Best(logits, args.vocab);
  const auto first = static_cast<int32_t>(~static_cast<uint32_t>(best));
  if (!(params.temperature > 0)) {
    if (threadIdx.x == 0) token = first;
    return;
  }
  const Row row = {logits, args.vocab, LogitOf(static_cast<uint32_t>(best >> 32)),
                   params.temperature};
  ForEach(kNumBins, [&](int64_t i) { memory.counts[i] = 0, memory.weights[i] = 0; });
  __syncthreads();
  int64_t count = 0;
  uint64_t weight = 0;
  ForEach(args.vocab, [&](int64_t i) {
    const int32_t rank = row.Rank(i);
    if (rank < 0) return;
    const uint64_t mine = WeightOf(rank);
    atomicAdd(&memory.counts[rank / kRanksOfBin], 1u);
    atomicAdd(&memory.weights[rank / kRanksOfBin], static_cast<unsigned long long>(mine));
    ++count;
    weight += mine;
  });
  count = BlockReduce(count, [](int64_t a, int64_t b) { return a + b; });
  RankCut cut = {kNumRanks, 0, 0};
  cut.weight = BlockReduce(weight, [](uint64_t a, uint64_t b) { return a + b; });
  if (count == 0) {
    if (threadIdx.x == 0) token = 0;
    return;
  }
  if (params.top_k > 0 && params.top_k < count) {
    const int64_t wanted = params.top_k;
    CutRow(
        row, memory, [&](int64_t so_far, uint64_t) { return so_far >= wanted; },
        [&](const BinPlace& place, uint64_t) { return wanted - place.count; });
    cut = memory.cut;
  }
  const uint64_t wanted = WantedWeight(params.top_p, cut.weight);
  if (wanted < cut.weight) {
    CutRow(
        row, memory, [&](int64_t, uint64_t so_far) { return so_far >= wanted; },
        [&](const BinPlace& place, uint64_t of_one) {
          return static_cast<int64_t>((wanted - place.weight + of_one - 1) / of_one);
        });
    cut = memory.cut;
  }
  const int32_t drawn = Walk(row, cut, __umul64hi(params.random, cut.weight), memory);
  if (threadIdx.x == 0) token = drawn;
}

}  // namespace

// ---- Launchers

namespace cuda {

void Sample(const SampleArgs& args, Executor& executor) {
  Launch(SampleKernel, Blocks(args.num_rows), kSampleThreads, executor, args);
}

}  // namespace cuda
}  // namespace ternion::kernels
