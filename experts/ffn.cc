#include "experts/ffn.h"

#include "base/check.h"

namespace ternion::experts {

using kernels::CodeStride;

FfnWorkspace::FfnWorkspace(int64_t max_rows, int64_t max_intermediate, base::Memory& memory)
    : max_rows_(max_rows),
      gate_(max_rows * max_intermediate, memory),
      up_(max_rows * max_intermediate, memory),
      codes_(max_rows * CodeStride(max_intermediate), memory),
      scales_(max_rows, memory),
      sums_(max_rows, memory) {}

void ActivateFfn(const kernels::Kernels& kernels, kernels::Executor& executor,
                 const FfnConfig& config, float* gate, const float* up,
                 const kernels::QuantizedRows& out) {
  kernels.quantize({.x = gate,
                    .weight = config.sub_norm,
                    .out = out,
                    .x_stride = config.intermediate,
                    .eps = config.eps,
                    .join = kernels::JoinOf(config.activation),
                    .y = up,
                    .joined = gate},
                   executor);
}

void RunFfn(const kernels::Kernels& kernels, kernels::Executor& executor, const FfnConfig& config,
            const kernels::QuantizedRows& x, std::span<const FfnGroup> groups,
            FfnWorkspace& workspace, float* y) {
  TERNION_CHECK(x.num_rows <= workspace.max_rows_);
  const int64_t inner = config.intermediate;
  float* gate = workspace.gate_.data();
  float* up = workspace.up_.data();
  std::vector<kernels::TernaryGroup>& products = workspace.groups_;
  const auto multiply = [&](const kernels::QuantizedRows& rows) {
    kernels.ternary_matmul({.x = rows, .groups = products}, executor);
    products.clear();
  };

  // relu2 needs up only where the gate is above 0.
  const bool gate_first = config.activation == kernels::Activation::kRelu2 && kernels.skips_lines;
  products.clear();
  for (const FfnGroup& group : groups) {
    products.push_back({group.weights->gate.view, group.row_begin, group.num_rows,
                        gate + group.row_begin * inner, inner});
  }
  if (gate_first) multiply(x);
  for (const FfnGroup& group : groups) {
    const int64_t offset = group.row_begin * inner;
    products.push_back({group.weights->up.view, group.row_begin, group.num_rows, up + offset, inner,
                        gate_first ? gate + offset : nullptr});
  }
  multiply(x);

  const kernels::QuantizedRows inner_rows = {
      workspace.codes_.data(), workspace.scales_.data(), workspace.sums_.data(), x.num_rows, inner,
      CodeStride(inner)};
  ActivateFfn(kernels, executor, config, gate, up, inner_rows);

  for (const FfnGroup& group : groups) {
    products.push_back({group.weights->down.view, group.row_begin, group.num_rows,
                        y + group.row_begin * config.hidden, config.hidden});
  }
  multiply(inner_rows);
}

}  // namespace ternion::experts
