// Random experts, and what they give computed row by row.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "experts/ffn.h"
#include "kernels/select.h"

namespace ternion::experts {

inline std::vector<float> RandomFloats(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

inline kernels::OwnedTernaryMatrix RandomTernary(
    int64_t rows, int64_t columns, std::mt19937& random,
    kernels::TernaryLayout layout = kernels::TernaryLayout::kPanels) {
  std::vector<int8_t> weights(rows * columns);
  for (int8_t& weight : weights) weight = static_cast<int8_t>(random() % 3) - 1;
  const float scale = 0.5f + static_cast<float>(random() % 1000) / 1000.0f;
  kernels::OwnedTernaryMatrix matrix = kernels::MakeTernaryMatrix(rows, columns, scale, layout);
  kernels::PackTernary(weights.data(), 0, rows, matrix);
  return matrix;
}

// The weights of expert `expert` of `layer`: the same wherever it is made. `sparse`: laid out so
// that relu2 can skip codes.
inline FfnWeights MakeExpert(int layer, int expert, int64_t hidden, int64_t intermediate,
                             bool sparse = false) {
  using kernels::TernaryLayout;
  const TernaryLayout up = sparse ? TernaryLayout::kRows : TernaryLayout::kPanels;
  const TernaryLayout down = sparse ? TernaryLayout::kColumns : TernaryLayout::kPanels;
  std::mt19937 random(layer * 1000 + expert);
  FfnWeights weights;
  weights.gate = RandomTernary(intermediate, hidden, random);
  weights.up = RandomTernary(intermediate, hidden, random, up);
  weights.down = RandomTernary(hidden, intermediate, random, down);
  return weights;
}

// y [hidden] of one row, one op after the other.
inline std::vector<float> RunExpertAlone(const kernels::Kernels& kernels,
                                         kernels::Executor& executor, const FfnConfig& config,
                                         const FfnWeights& weights, const int8_t* codes,
                                         float scale) {
  const auto multiply = [&](const kernels::QuantizedRows& x, const kernels::TernaryMatrix& w) {
    std::vector<float> y(w.rows);
    const kernels::TernaryGroup group[] = {{w, 0, 1, y.data(), w.rows}};
    kernels.ternary_matmul({.x = x, .groups = group}, executor);
    return y;
  };
  kernels::QuantizedBuffer input(1, config.hidden);
  kernels.gather_rows({.rows = &codes, .scales = &scale, .out = input.rows(1)}, executor);
  std::vector<float> gate = multiply(input.rows(1), weights.gate.view);
  const std::vector<float> up = multiply(input.rows(1), weights.up.view);
  kernels::QuantizedBuffer inner(1, config.intermediate);
  kernels.quantize({.x = gate.data(),
                    .weight = config.sub_norm,
                    .out = inner.rows(1),
                    .x_stride = config.intermediate,
                    .eps = config.eps,
                    .join = kernels::JoinOf(config.activation),
                    .y = up.data(),
                    .joined = gate.data()},
                   executor);
  return multiply(inner.rows(1), weights.down.view);
}

inline void AddScaled(const std::vector<float>& row, float weight, float* out) {
  for (size_t i = 0; i < row.size(); ++i) out[i] += weight * row[i];
}

}  // namespace ternion::experts
