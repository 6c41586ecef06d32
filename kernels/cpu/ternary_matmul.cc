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

int64_t NumBlocks(const TernaryGroup& group) {
  return base::CeilDiv(group.weights.columns, kBlockColumns);
}

int64_t PanelCost(const TernaryGroup& group) {
  return group.num_rows > 0 ? NumBlocks(group) * (kFetchCost + group.num_rows) : 0;
}

PanelRun MakeRun(const QuantizedRows& x, const TernaryGroup& group, int64_t first_panel,
                 int64_t last_panel, uint8_t* scratch) {
  const TernaryMatrix& weights = group.weights;
  const QuantizedRows rows = x.Slice(group.row_begin, group.num_rows);
  const int64_t first_output = first_panel * kPanelRows;
  return {.codes = weights.codes + first_panel * weights.panel_bytes(),
          .num_blocks = NumBlocks(group),
          .num_outputs = std::min(last_panel * kPanelRows, weights.rows) - first_output,
          .weight_scale = weights.scale,
          .x = rows.codes,
          .x_stride = rows.stride,
          .x_scales = rows.scales,
          .x_sums = rows.sums,
          .num_rows = rows.num_rows,
          .y = group.y + first_output,
          .y_stride = group.y_stride,
          .scratch = scratch};
}

// All groups lie one after another on a line of cost; each thread takes one stretch of it, that is,
// the panels that begin there: contiguous weights, and no two threads in one panel.
void Matmul(const TernaryMatmulArgs& args, Executor& executor,
            void (*run_panels)(const PanelRun&)) {
  int64_t total = 0;
  for (const TernaryGroup& group : args.groups)
    total += PanelCost(group) * group.weights.num_panels();

  base::ThreadPool& threads = *executor.threads;
  threads.ParallelFor(total, kMinCostPerThread, [&](int64_t begin, int64_t end, int thread) {
    for (const TernaryGroup& group : args.groups) {
      const int64_t panel_cost = PanelCost(group);
      if (panel_cost == 0) continue;
      const int64_t num_panels = group.weights.num_panels();
      const int64_t first = base::CeilDiv(std::max<int64_t>(begin, 0), panel_cost);
      const int64_t last =
          std::min(base::CeilDiv(std::max<int64_t>(end, 0), panel_cost), num_panels);
      if (first < last) run_panels(MakeRun(args.x, group, first, last, threads.scratch(thread)));
      begin -= panel_cost * num_panels;
      end -= panel_cost * num_panels;
    }
  });
}

}  // namespace

namespace scalar {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, RunPanels);
}
}  // namespace scalar

namespace avx2 {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, RunPanels);
}
}  // namespace avx2

namespace avxvnni {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, RunPanels);
}
}  // namespace avxvnni

namespace avx512vnni {
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor) {
  Matmul(args, executor, RunPanels);
}
}  // namespace avx512vnni

}  // namespace ternion::kernels
