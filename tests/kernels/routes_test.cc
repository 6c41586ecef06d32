// The ops that take rows through experts on a device, against the same on a CPU by hand.
#include <algorithm>
#include <numeric>

#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

struct Shape {
  int64_t num_rows;
  int k;
  int num_experts;
};
const Shape kShapes[] = {{1, 1, 1},  {1, 8, 8},    {5, 2, 3},  {33, 8, 64},
                         {7, 3, 40}, {3, 4, 2500}, {100, 2, 3}};

// The k distinct experts of each row.
std::vector<int32_t> RandomChoice(const Shape& shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> all(shape.num_experts), choice;
  std::iota(all.begin(), all.end(), 0);
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    std::shuffle(all.begin(), all.end(), random);
    choice.insert(choice.end(), all.begin(), all.begin() + shape.k);
  }
  return choice;
}

struct Grouped {
  std::vector<int32_t> order, places, begin, used;
};

Grouped GroupByHand(const Shape& shape, const std::vector<int32_t>& experts) {
  Grouped grouped;
  grouped.order.resize(experts.size());
  grouped.places.resize(experts.size());
  grouped.begin.resize(shape.num_experts + 1);
  std::iota(grouped.order.begin(), grouped.order.end(), 0);
  std::stable_sort(grouped.order.begin(), grouped.order.end(),
                   [&](int32_t a, int32_t b) { return experts[a] < experts[b]; });
  for (size_t i = 0; i < experts.size(); ++i) grouped.places[grouped.order[i]] = i;
  for (int32_t expert : experts) ++grouped.begin[expert + 1];
  for (int e = 0; e < shape.num_experts; ++e) {
    if (grouped.begin[e + 1] > 0) grouped.used.push_back(e);
  }
  grouped.used.resize(shape.num_experts, -1);
  std::partial_sum(grouped.begin.begin(), grouped.begin.end(), grouped.begin.begin());
  return grouped;
}

class Routes : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    cuda_ = CudaVariant(executor_);
    if (cuda_ == nullptr) GTEST_SKIP() << "these ops are for devices";
  }
  int64_t num_routes() const { return GetParam().num_rows * GetParam().k; }

  Executor executor_;
  const Kernels* cuda_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Shapes, Routes, testing::ValuesIn(kShapes));

TEST_P(Routes, AreGroupedByExpertAndStayInOrder) {
  const Shape& shape = GetParam();
  const std::vector<int32_t> experts = RandomChoice(shape, 1);
  Grouped actual = {std::vector<int32_t>(num_routes(), -2), std::vector<int32_t>(num_routes(), -2),
                    std::vector<int32_t>(shape.num_experts + 1, -2),
                    std::vector<int32_t>(shape.num_experts, -2)};
  cuda_->group_routes({experts.data(), actual.order.data(), actual.places.data(),
                       actual.begin.data(), actual.used.data(), num_routes(), shape.num_experts},
                      executor_);
  const Grouped expected = GroupByHand(shape, experts);
  EXPECT_EQ(actual.order, expected.order);
  EXPECT_EQ(actual.places, expected.places);
  EXPECT_EQ(actual.begin, expected.begin);
  EXPECT_EQ(actual.used, expected.used);
}

TEST_P(Routes, TakeTheirRowsThroughTheirExperts) {
  const Shape& shape = GetParam();
  const int64_t outputs = 37, dim = 100;
  const std::vector<int32_t> experts = RandomChoice(shape, 2);
  const Grouped grouped = GroupByHand(shape, experts);
  const std::vector<float> values = RandomFloats(shape.num_rows * dim, 3);
  QuantizedBuffer rows(shape.num_rows, dim), gathered(num_routes(), dim);
  const QuantizedRows x = rows.rows(shape.num_rows), of_routes = gathered.rows(num_routes());
  Executor alone = {&Threads(1)};
  Fastest().quantize({.x = values.data(), .out = x, .x_stride = dim}, alone);
  for (int64_t i = 0; i < num_routes(); ++i) {
    const int64_t row = grouped.order[i] / shape.k;
    std::copy_n(x.codes + row * x.stride, x.stride, of_routes.codes + i * x.stride);
    of_routes.scales[i] = x.scales[row];
    of_routes.sums[i] = x.sums[row];
  }

  // Experts share three matrices, with a scale each.
  std::mt19937 random(4);
  std::vector<OwnedTernaryMatrix> panels, tiles, base3;
  for (int i = 0; i < 3; ++i) {
    std::vector<int8_t> weights(outputs * dim);
    for (int8_t& w : weights) w = static_cast<int8_t>(static_cast<int>(random() % 3) - 1);
    panels.push_back(MakeTernaryMatrix(outputs, dim, 1));
    tiles.push_back(MakeTernaryMatrix(outputs, dim, 1, cuda_->layout));
    base3.push_back(MakeTernaryMatrix(outputs, dim, 1, TernaryLayout::kTilesBase3));
    for (auto* matrices : {&panels, &tiles, &base3}) {
      PackTernary(weights.data(), 0, outputs, matrices->back());
    }
  }
  std::vector<TernaryMatrix> by_hand;
  for (int e = 0; e < shape.num_experts; ++e) {
    by_hand.push_back(panels[e % 3].view);
    by_hand[e].scale = 1.0f + static_cast<float>(e);
  }
  std::vector<float> expected(num_routes() * outputs);
  for (int64_t i = 0; i < num_routes(); ++i) {
    const int32_t route = grouped.order[i];
    const TernaryGroup group[] = {
        {by_hand[experts[route]], route / shape.k, 1, &expected[i * outputs], outputs}};
    Fastest().ternary_matmul({x, group}, alone);
  }
  for (const auto* matrices : {&tiles, &base3}) {
    std::vector<TernaryMatrix> of_experts;
    for (int e = 0; e < shape.num_experts; ++e) {
      of_experts.push_back((*matrices)[e % 3].view);
      of_experts[e].scale = by_hand[e].scale;
    }
    const std::vector<TernaryMatrix> first_twice(shape.num_experts, of_experts[0]);
    std::vector<float> first_only(num_routes() * outputs, -1);
    const TernaryGroup all[] = {
        {panels[0].view, 0, num_routes(), first_only.data(), outputs, nullptr}};
    Fastest().ternary_matmul({of_routes, all}, alone);
    for (const bool in_order : {true, false}) {  // rows that were put in order, or are found by it
      std::vector<float> y(num_routes() * outputs, -1), other(y.size(), -1);
      cuda_->expert_matmul(
          {.x = in_order ? of_routes : x,
           .matrices = {{of_experts.data(), y.data()}, {first_twice.data(), other.data()}},
           .num_matrices = 2,
           .order = in_order ? nullptr : grouped.order.data(),
           .k = shape.k,
           .num_routes = num_routes(),
           .begin = grouped.begin.data(),
           .used = grouped.used.data(),
           .rows = outputs,
           .num_experts = shape.num_experts,
           .layout = of_experts[0].layout},
          executor_);
      ExpectSameBits(y, expected);
      ExpectSameBits(other, first_only);
    }
  }
}

TEST_P(Routes, AreSummedInAscendingExpertId) {
  const Shape& shape = GetParam();
  const int64_t dim = 300;
  const std::vector<int32_t> experts = RandomChoice(shape, 5);
  const Grouped grouped = GroupByHand(shape, experts);
  const std::vector<float> y = RandomFloats(num_routes() * dim, 6);
  const std::vector<float> weights = RandomFloats(num_routes(), 7);
  for (const bool presum : {true, false}) {
    std::vector<float> out = RandomFloats(shape.num_rows * dim, 8);
    std::vector<float> expected = out;
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      std::vector<int32_t> routes(shape.k);
      std::iota(routes.begin(), routes.end(), row * shape.k);
      std::sort(routes.begin(), routes.end(),
                [&](int32_t a, int32_t b) { return experts[a] < experts[b]; });
      for (int64_t i = 0; i < dim; ++i) {
        float& sum_out = expected[row * dim + i];
        float sum = presum ? 0.0f : sum_out;
        for (int32_t r : routes) sum += weights[r] * y[grouped.places[r] * dim + i];
        sum_out = presum ? sum_out + sum : sum;
      }
    }
    cuda_->sum_routes({y.data(), grouped.places.data(), weights.data(), out.data(), shape.num_rows,
                       dim, shape.k, presum},
                      executor_);
    ExpectSameBits(out, expected);
  }
}

}  // namespace
}  // namespace ternion::kernels
