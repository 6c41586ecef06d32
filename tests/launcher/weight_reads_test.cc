#include "launcher/weight_reads.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/select.h"

namespace ternion::launcher {
namespace {

using kernels::OwnedTernaryMatrix;
using kernels::TernaryGroup;
using kernels::TernaryLayout;

// On a rank of the scalar kernels: what a line adds is counted, whether they skip it or not.
class WeightReadsTest : public testing::Test {
 protected:
  static constexpr int64_t kOutputs = 40, kInputs = 24, kRows = 3;

  void Multiply(const std::vector<TernaryGroup>& groups) {
    reads_.kernels().ternary_matmul({.x = x_.rows(kRows), .groups = groups}, executor_);
  }
  void BeginStep(int64_t rows) {
    std::vector<float> table(kInputs), out(rows * kInputs);
    const std::vector<int32_t> ids(rows);
    reads_.kernels().embed({.table = {table.data(), kernels::DenseType::kFp32, 1, kInputs},
                            .ids = ids.data(),
                            .out = out.data(),
                            .num_rows = rows},
                           executor_);
  }
  TernaryGroup Group(const OwnedTernaryMatrix& matrix, int64_t num_rows,
                     const float* gate = nullptr) {
    return {matrix.view, 0, num_rows, y_.data(), kOutputs, gate};
  }

  base::ThreadPool threads_{1};
  kernels::Executor executor_{.threads = &threads_};
  WeightReads reads_{*kernels::SelectCpuKernels("scalar"), executor_};
  kernels::QuantizedBuffer x_{kRows, kInputs};
  std::vector<float> y_ = std::vector<float>(kRows * kOutputs);
  const OwnedTernaryMatrix panels_ = kernels::MakeTernaryMatrix(kOutputs, kInputs, 1);
};

TEST_F(WeightReadsTest, AMatrixCountsOnceAStep) {
  reads_.Start();
  for (int step = 0; step < 2; ++step) {
    BeginStep(kRows);
    Multiply({Group(panels_, 2), Group(panels_, 0)});
    Multiply({Group(panels_, 1)});
  }
  const WeightReadCounts counts = reads_.Stop();
  EXPECT_EQ(counts.steps, 2);
  EXPECT_EQ(counts.rows, 2 * kRows);
  EXPECT_EQ(counts.ternary_matrices, 2);
  EXPECT_EQ(counts.bytes, 2 * panels_.view.bytes());
}

TEST_F(WeightReadsTest, WhatHasNoRowsIsNotRead) {
  reads_.Start();
  BeginStep(0);
  Multiply({Group(panels_, 0)});
  const WeightReadCounts counts = reads_.Stop();
  EXPECT_EQ(counts.steps, 1);
  EXPECT_EQ(counts.ternary_matrices, 0);
  EXPECT_EQ(counts.bytes, 0);
}

TEST_F(WeightReadsTest, OutputsThatNoRowWantsAreNotRead) {
  const OwnedTernaryMatrix rows =
      kernels::MakeTernaryMatrix(kOutputs, kInputs, 1, TernaryLayout::kRows);
  std::vector<float> gate(kRows * kOutputs, -1.0f);
  gate[0 * kOutputs + 7] = gate[1 * kOutputs + 7] = 1;  // one line
  gate[1 * kOutputs + 39] = std::nanf("");
  gate[1 * kOutputs + 8] = 0;
  gate[2 * kOutputs + 9] = 1;  // of a row that is not multiplied
  reads_.Start();
  BeginStep(kRows);
  Multiply({Group(rows, 2, gate.data())});
  EXPECT_EQ(reads_.Stop().bytes, 2 * rows.view.stride_bytes());
  reads_.Start();
  BeginStep(kRows);
  Multiply({Group(rows, 2)});
  EXPECT_EQ(reads_.Stop().bytes, rows.view.bytes());
}

TEST_F(WeightReadsTest, InputsThatAreZeroAreNotRead) {
  const OwnedTernaryMatrix columns =
      kernels::MakeTernaryMatrix(kOutputs, kInputs, 1, TernaryLayout::kColumns);
  const kernels::QuantizedRows x = x_.rows(kRows);
  x.codes[0 * x.stride + 3] = 5;
  x.codes[1 * x.stride + 3] = x.codes[1 * x.stride + 23] = -1;
  x.codes[2 * x.stride + 4] = 1;
  reads_.Start();
  BeginStep(kRows);
  TernaryGroup group = Group(columns, 2);
  group.row_begin = 1;
  Multiply({group});
  EXPECT_EQ(reads_.Stop().bytes, 3 * columns.view.stride_bytes());
}

TEST_F(WeightReadsTest, DenseMatricesCountByTheirType) {
  const std::vector<uint16_t> weights(5 * kInputs);
  const std::vector<float> x(kInputs);
  std::vector<float> y(5);
  reads_.Start();
  BeginStep(1);
  for (int i = 0; i < 2; ++i) {
    reads_.kernels().dense_matmul(
        {.x = x.data(),
         .weights = {weights.data(), kernels::DenseType::kBf16, 5, kInputs},
         .y = y.data(),
         .num_rows = 1,
         .x_stride = kInputs,
         .y_stride = 5},
        executor_);
  }
  const WeightReadCounts counts = reads_.Stop();
  EXPECT_EQ(counts.bytes, 5 * kInputs * 2);
  EXPECT_EQ(counts.ternary_matrices, 0);
}

TEST_F(WeightReadsTest, NothingIsCountedBeforeAndAfter) {
  BeginStep(1);
  Multiply({Group(panels_, 1)});
  reads_.Start();
  reads_.Stop();
  BeginStep(1);
  Multiply({Group(panels_, 1)});
  reads_.Start();
  const WeightReadCounts counts = reads_.Stop();
  EXPECT_EQ(counts.steps, 0);
  EXPECT_EQ(counts.bytes, 0);
}

}  // namespace
}  // namespace ternion::launcher
