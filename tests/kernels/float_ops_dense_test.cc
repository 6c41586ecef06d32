// Dense products and the gate.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

struct DenseShape {
  int64_t rows, outputs, columns;
};
const DenseShape kShapes[] = {{1, 1, 1},      {1, 5, 17},    {3, 4, 16},    {4, 9, 33},
                              {5, 3, 100},    {70, 11, 257}, {1, 300, 500}, {37, 30, 130},
                              {2, 64, 1024},  {13, 70, 72},  {9, 64, 144},  {1, 8203, 160},
                              {3, 8200, 144}, {11, 4100, 80}};

// The documented order, spelled out: results must be these very bits.
float DotReference(const float* x, const float* w, int64_t n) {
  float lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float product = x[i] * w[i];
    lanes[i % 16] += product;
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

class DenseMatmul : public testing::TestWithParam<DenseShape> {};

TEST_P(DenseMatmul, SumsInTheDocumentedOrder) {
  const auto [rows, outputs, columns] = GetParam();
  // Some rows begin at multiples of 16 bytes.
  const int64_t x_pad = columns % 8 == 0 ? 4 : 2, x_stride = columns + x_pad,
                y_stride = outputs + 1;
  const std::vector<float> x = RandomFloats(rows * x_stride - x_pad, 1);
  const std::vector<uint16_t> narrow = RandomBf16(outputs * columns, 2);
  std::vector<float> wide;
  for (uint16_t value : narrow) wide.push_back(FromBf16(value));
  std::vector<float> expected(rows * y_stride, -7.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      expected[r * y_stride + o] = DotReference(&x[r * x_stride], &wide[o * columns], columns);
    }
  }
  for (const DenseMatrix& weights :
       {DenseMatrix{narrow.data(), DenseType::kBf16, outputs, columns},
        DenseMatrix{wide.data(), DenseType::kFp32, outputs, columns}}) {
    const std::vector<float> y = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      std::vector<float> result(expected.size(), -7.0f);
      kernels.dense_matmul({x.data(), weights, result.data(), rows, x_stride, y_stride}, executor);
      return result;
    });
    ExpectSameBits(y, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, DenseMatmul, testing::ValuesIn(kShapes));

struct Choice {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Choice RunGate(const Kernels& kernels, Executor& executor, const std::vector<float>& logits,
               int experts, int k, bool renormalize) {
  const int64_t rows = static_cast<int64_t>(logits.size()) / experts;
  Choice choice = {std::vector<int32_t>(rows * k, -1), std::vector<float>(rows * k)};
  kernels.gate_top_k(
      {logits.data(), choice.ids.data(), choice.weights.data(), rows, experts, k, renormalize},
      executor);
  return choice;
}

Choice GateOnEveryVariant(const std::vector<float>& logits, int experts, int k, bool renormalize) {
  Choice choice;
  choice.ids = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    return RunGate(kernels, executor, logits, experts, k, renormalize).ids;
  });
  choice.weights = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    return RunGate(kernels, executor, logits, experts, k, renormalize).weights;
  });
  return choice;
}

struct GateShape {
  int64_t rows;
  int experts, k;
};

TEST(GateTopK, MatchesFormula) {
  for (const GateShape& shape :
       {GateShape{1, 1, 1}, {3, 8, 2}, {2, 17, 17}, {300, 128, 8}, {5, 20, 3}}) {
    for (const bool renormalize : {false, true}) {
      const std::vector<float> logits = RandomFloats(shape.rows * shape.experts, 3, 4.0f);
      const Choice choice = GateOnEveryVariant(logits, shape.experts, shape.k, renormalize);
      for (int64_t r = 0; r < shape.rows; ++r) {
        const float* row = &logits[r * shape.experts];
        std::vector<int32_t> order(shape.experts);
        for (int e = 0; e < shape.experts; ++e) order[e] = e;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
        double sum = 0, chosen = 0;
        for (int j = 0; j < shape.experts; ++j) {
          sum += std::exp(double{row[order[j]]});
          if (j < shape.k) chosen = sum;
        }
        for (int j = 0; j < shape.k; ++j) {
          ASSERT_EQ(choice.ids[r * shape.k + j], order[j]) << "row " << r;
          const double want = std::exp(double{row[order[j]]}) / (renormalize ? chosen : sum);
          ASSERT_NEAR(choice.weights[r * shape.k + j], want, 5e-6 * want) << "row " << r;
        }
      }
    }
  }
}

TEST(GateTopK, TiesGoToTheLowerId) {
  const std::vector<float> logits = {1, 3, 2, 3, 2, 3, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0};
  const Choice choice = GateOnEveryVariant(logits, 8, 5, false);
  EXPECT_EQ(choice.ids, (std::vector<int32_t>{1, 3, 5, 2, 4, 0, 1, 2, 3, 4}));
}

TEST(GateTopK, ExtremeLogits) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Choice choice = GateOnEveryVariant({-infinity, 200.0f, -1e30f, 100.0f}, 4, 4, true);
  EXPECT_EQ(choice.ids, (std::vector<int32_t>{1, 0, 2, 3}));
  EXPECT_EQ(choice.weights, (std::vector<float>{1, 0, 0, 0}));
}

// The least that counts, and that less than a normal float is nothing.
TEST(GateTopK, SmallWeights) {
  const std::vector<float> logits = {0.0f, -30.0f, -60.0f, -80.0f, -87.3f, -87.4f, -88.0f};
  const Choice choice = GateOnEveryVariant(logits, 7, 7, false);
  for (int i = 0; i < 5; ++i) {
    const double want = std::exp(double{logits[i]});
    EXPECT_NEAR(choice.weights[i], want, 1e-6 * want) << logits[i];
  }
  EXPECT_EQ(choice.weights[5], 0.0f);
  EXPECT_EQ(choice.weights[6], 0.0f);
}

TEST(GateTopK, NanGivesDistinctIdsInRange) {
  std::vector<float> logits = RandomFloats(40, 4);
  logits[3] = logits[17] = std::numeric_limits<float>::quiet_NaN();
  for (const char* isa : AvailableIsas()) {
    Executor executor = {&Threads(1)};
    Choice choice = RunGate(*SelectCpuKernels(isa), executor, logits, 20, 6, true);
    for (int row = 0; row < 2; ++row) {
      std::sort(choice.ids.begin() + row * 6, choice.ids.begin() + row * 6 + 6);
      for (int j = 0; j < 6; ++j) {
        const int32_t id = choice.ids[row * 6 + j];
        EXPECT_TRUE(id >= 0 && id < 20) << id;
        if (j > 0) {
          EXPECT_NE(id, choice.ids[row * 6 + j - 1]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace ternion::kernels
