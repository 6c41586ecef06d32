// How the groups of a ternary matmul are split over threads. The arithmetic is in
// ternary_<variant>.cc.

#include <algorithm>

#include "kernels/cpu/ternary_panels.h"
#include "kernels/cpu/variants.h"

namespace ternion::kernels {
namespace {

// Cost of a block of weights: fetching it takes about as long as multiplying it with this many
// rows.
constexpr int64_t kFetchCost = 4;

// Below this cost per thread (a few microseconds) waking the others takes longer than it saves.
constexpr int64_t kMinCostPerThread = 8192;

// With fewer cache lines of a column per thread, threads share lines: shares must be even.
constexpr int64_t kMinLinesPerThread = 4;

// What threads get whole multiples of.
struct Unit {
  int64_t outputs;
  int64_t count;  // in the group
  int64_t cost;   // all codes read: which of them are not is known only later
};

Unit UnitOf(const TernaryGroup& group, bool narrow) {
  const bool columns = group.weights.layout == TernaryLayout::kColumns;
  narrow = narrow && group.num_rows <= kMaxNarrowRows;
  const int64_t outputs = !columns ? kPanelRows : narrow ? kNarrowOutputs : kLineOutputs;
  const int64_t blocks = group.weights.num_blocks() * (outputs / kPanelRows);
  return {outputs, base::CeilDiv(group.weights.rows, outputs),
          group.num_rows > 0 ? blocks * (kFetchCost + group.num_rows) : 0};
}

// Outputs [begin, end) of the group, begin at a unit.
TernaryRun MakeRun(const QuantizedRows& x, const TernaryGroup& group, int64_t begin, int64_t end,
                   uint8_t* scratch) {
  const TernaryMatrix& weights = group.weights;
  const QuantizedRows rows = x.Slice(group.row_begin, group.num_rows);
  return {.codes = weights.codes + weights.GranuleOffset(begin, 0),
          .stride_bytes = weights.stride_bytes(),
          .num_blocks = weights.num_blocks(),
          .num_outputs = end - begin,
          .weight_scale = weights.scale,
          .x = rows.codes,
          .x_stride = rows.stride,
          .x_scales = rows.scales,
          .x_sums = rows.sums,
          .num_rows = rows.num_rows,
          .y = group.y + begin,
          .y_stride = group.y_stride,
          .gate = group.gate == nullptr ? nullptr : group.gate + begin,
          .scratch = scratch};
}

// A variant's arithmetic, by layout.
struct Variant {
  void (*panels)(const TernaryRun&);
  void (*rows)(const TernaryRun&);
  void (*columns)(const TernaryRun&);

  void Run(TernaryLayout layout, const TernaryRun& run) const {
    (layout == TernaryLayout::kPanels ? panels
     : layout == TernaryLayout::kRows ? rows
                                      : columns)(run);
  }
};

// All groups lie one after another on a line of cost; each thread takes one stretch of it, that is,
// the units that begin there: contiguous weights, and no two threads in one panel.
void Matmul(const TernaryMatmulArgs& args, Executor& executor, const Variant& variant) {
  base::ThreadPool& threads = *executor.threads;
  int64_t lines = 0, total = 0;
  for (const TernaryGroup& group : args.groups) {
    if (group.num_rows > 0) lines += base::CeilDiv(group.weights.rows, kLineOutputs);
  }
  const bool narrow = lines < kMinLinesPerThread * threads.num_threads();
  for (const TernaryGroup& group : args.groups) {
    const Unit unit = UnitOf(group, narrow);
    total += unit.cost * unit.count;
  }

  threads.ParallelFor(total, kMinCostPerThread, [&](int64_t begin, int64_t end, int thread) {
    for (const TernaryGroup& group : args.groups) {
      const auto [outputs, units, cost] = UnitOf(group, narrow);
      if (cost == 0) continue;
      const int64_t first = base::CeilDiv(std::max<int64_t>(begin, 0), cost);
      const int64_t last = std::min(base::CeilDiv(std::max<int64_t>(end, 0), cost), units);
      if (first < last) {
        variant.Run(group.weights.layout,
                    MakeRun(args.x, group, first * outputs,
                            std::min(last * outputs, group.weights.rows), threads.scratch(thread)));
      }
      begin -= cost * units;
      end -= cost * units;
    }
  });
}

}  // namespace

namespace scalar {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, {RunPanels, RunRows, RunColumns});
}
}  // namespace scalar

namespace avx2 {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, {RunPanels, RunRows, RunColumns});
}
}  // namespace avx2

namespace avxvnni {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, {RunPanels, RunRows, RunColumns});
}
}  // namespace avxvnni

namespace avx512vnni {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, {RunPanels, RunRows, RunColumns});
}
}  // namespace avx512vnni

}  // namespace ternion::kernels
