// Products with dense matrices: the head and the gate.
#pragma once

#include "kernels/cpu/float_ops_common.inc.h"

namespace ternion::kernels {
namespace {

// A tile is kTileRows rows of x times kTileOutputs rows of weights, as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int kTileRows = 4;
constexpr int kTileOutputs = 4;
#else
constexpr int kTileRows = 2;
constexpr int kTileOutputs = 2;
#endif

// Rows of x that should stay in L2 while all weights pass by.
constexpr int64_t kRowBlock = 32;

inline F32x16 LoadWeights(const float* p, int64_t n) { return LoadN(p, n); }
inline F32x16 LoadWeights(const uint16_t* p, int64_t n) { return LoadBf16N(p, n); }

template <typename W>
struct DenseView {
  const float* x;
  const W* weights;
  float* y;
  int64_t columns;
  int64_t x_stride;
  int64_t y_stride;
};

// Adds the products of columns i .. i + n - 1.
template <int R, int O, typename W>
TERNION_INLINE void DotStep(const float* x, int64_t x_stride, const W* weights, int64_t columns,
                            int64_t n, F32x16 (&sums)[R][O]) {
  F32x16 w[O];
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o) {
    const W* p = weights + o * columns;
    // Rows of weights are too short for the hardware to run ahead: ask for the next tile's.
    __builtin_prefetch(p + O * columns);
    w[o] = LoadWeights(p, n);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const F32x16 v = LoadN(x + r * x_stride, n);
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) sums[r][o] = sums[r][o] + v * w[o];
  }
}

// y[row + r][output + o] for R rows and O outputs.
template <int R, int O, typename W>
inline void DotTile(const DenseView<W>& view, int64_t row, int64_t output) {
  const int64_t columns = view.columns;
  const int64_t x_stride = view.x_stride;
  const float* x = view.x + row * x_stride;
  const W* weights = view.weights + output * columns;
  F32x16 sums[R][O];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) sums[r][o] = Zero();
  }
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    DotStep(x + i, x_stride, weights + i, columns, kLanes, sums);
  }
  if (i < columns) DotStep(x + i, x_stride, weights + i, columns, columns - i, sums);
  float* y = view.y + row * view.y_stride + output;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) y[r * view.y_stride + o] = Sum(sums[r][o]);
  }
}

// O outputs of rows [begin, end).
template <int O, typename W>
inline void DotRows(const DenseView<W>& view, int64_t begin, int64_t end, int64_t output) {
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) DotTile<kTileRows, O>(view, row, output);
  for (; row + 2 <= end; row += 2) DotTile<2, O>(view, row, output);
  for (; row < end; ++row) DotTile<1, O>(view, row, output);
}

template <typename W>
inline void DotBlock(const DenseView<W>& view, int64_t row_begin, int64_t row_end,
                     int64_t out_begin, int64_t out_end) {
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t end = row_end - row < kRowBlock ? row_end : row + kRowBlock;
    int64_t output = out_begin;
    for (; output + kTileOutputs <= out_end; output += kTileOutputs) {
      DotRows<kTileOutputs>(view, row, end, output);
    }
    for (; output < out_end; ++output) DotRows<1>(view, row, end, output);
  }
}

// Threads share the outputs, so that each weight is read by one of them; or the rows, when there
// are more of them (the gate of a long prompt).
template <typename W>
inline void DenseMatmulOf(const DenseMatmulArgs& args, Executor& executor) {
  const int64_t outputs = args.weights.rows;
  const int64_t columns = args.weights.columns;
  const DenseView<W> view = {args.x,        static_cast<const W*>(args.weights.data),
                             args.y,        columns,
                             args.x_stride, args.y_stride};
  if (outputs >= args.num_rows) {
    const auto body = [&](int64_t begin, int64_t end, int) {
      DotBlock(view, 0, args.num_rows, begin, end);
    };
    executor.threads->ParallelFor(outputs, MinUnits(columns * args.num_rows), body);
  } else {
    const auto body = [&](int64_t begin, int64_t end, int) {
      DotBlock(view, begin, end, 0, outputs);
    };
    executor.threads->ParallelFor(args.num_rows, MinUnits(columns * outputs), body);
  }
}

void DenseMatmul(const DenseMatmulArgs& args, Executor& executor) {
  if (args.weights.type == DenseType::kBf16) {
    DenseMatmulOf<uint16_t>(args, executor);
  } else {
    DenseMatmulOf<float>(args, executor);
  }
}

}  // namespace
}  // namespace ternion::kernels
