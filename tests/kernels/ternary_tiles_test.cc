// Tiles of the ternary product, of all widths and on both kinds of tensor cores, against the CPU.
#include <algorithm>

#include "kernels/cuda/ternary_schedule.h"
#include "tests/kernels/float_ops_support.h"
#include "tests/kernels/ternary_support.h"

namespace ternion::kernels {
namespace {

constexpr float kGuard = -123.0f;

// Rows of x that go through some weights.
struct Part {
  const Weights* weights;
  int64_t row_begin, num_rows;
};

struct TileCase {
  bool warpgroups;
  int tile_rows;
  TernaryLayout layout;
};

class TernaryTiles : public testing::TestWithParam<TileCase> {
 protected:
  void SetUp() override {
    ASSERT_NE(CudaVariant(executor_), nullptr);
    if (!UseWarpgroups(GetParam().warpgroups)) GTEST_SKIP() << "not with this device";
  }
  void TearDown() override { UseWarpgroups(true); }

  // All by tiles, with guards around what may be written.
  void ExpectSame(const QuantizedRows& x, const std::vector<Part>& parts) {
    std::vector<std::vector<float>> y, expected;
    std::vector<TernaryGroup> groups, by_hand;
    for (const Part& part : parts) {
      const int64_t stride = part.weights->panels.view.rows + 3;
      for (auto* floats : {&y, &expected}) floats->emplace_back(part.num_rows * stride + 1, kGuard);
      groups.push_back({part.weights->tiles.view, part.row_begin, part.num_rows, y.back().data(),
                        stride, nullptr});
      by_hand.push_back({part.weights->panels.view, part.row_begin, part.num_rows,
                         expected.back().data(), stride, nullptr});
    }
    Executor alone = {&Threads(1)};
    Fastest().ternary_matmul({x, by_hand}, alone);
    ForGroups(
        groups, [](const TernaryGroup&) { return true; },
        [&](const TernaryGroups& some) {
          cuda::TernaryTiles(x, some, GetParam().tile_rows, executor_);
        });
    for (size_t i = 0; i < y.size(); ++i) {
      SCOPED_TRACE("part " + std::to_string(i));
      ExpectSameBits(y[i], expected[i]);
    }
  }

  Executor executor_;
};
std::vector<TileCase> TileCases() {
  std::vector<TileCase> cases;
  for (const TernaryLayout layout : {TernaryLayout::kTiles, TernaryLayout::kTilesBase3}) {
    for (const bool warpgroups : {true, false}) {
      for (const int tile_rows : {128, 64, 32}) cases.push_back({warpgroups, tile_rows, layout});
    }
  }
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Widths, TernaryTiles, testing::ValuesIn(TileCases()),
                         [](const auto& info) {
                           const TileCase& c = info.param;
                           return std::string(c.layout == TernaryLayout::kTiles ? "" : "Base3") +
                                  (c.warpgroups ? "Warpgroups" : "Warps") +
                                  std::to_string(c.tile_rows);
                         });

TEST_P(TernaryTiles, OddShapes) {
  std::mt19937 random(1);
  const int64_t outputs[] = {16, 40, 130}, columns[] = {1, 64, 80, 192, 400};
  int shape = 0;
  for (const int64_t num_rows : {1, 33, 63, 64, 65, 96, 97, 129, 200}) {
    for (int i = 0; i < 3; ++i, ++shape) {
      const int64_t rows = outputs[shape % 3], dim = columns[shape % 5];
      SCOPED_TRACE(std::to_string(num_rows) + " x " + std::to_string(rows) + " x " +
                   std::to_string(dim));
      QuantizedBuffer x = RandomRows(num_rows, dim, random);
      const Weights weights(rows, dim, 0.7f, GetParam().layout, random);
      ExpectSame(x.rows(num_rows), {{&weights, 0, num_rows}});
    }
  }
}

// More steps than stages, many times over.
TEST_P(TernaryTiles, ManyColumns) {
  std::mt19937 random(2);
  const int64_t num_rows = 101, dim = 3200;
  QuantizedBuffer x = RandomRows(num_rows, dim, random);
  const Weights weights(40, dim, 1.3f, GetParam().layout, random);
  ExpectSame(x.rows(num_rows), {{&weights, 0, num_rows}});
}

TEST_P(TernaryTiles, Groups) {
  std::mt19937 random(3);
  const int64_t num_rows = 150, dim = 100;
  QuantizedBuffer x = RandomRows(num_rows, dim, random);
  const Weights narrow(20, dim, 0.1f, GetParam().layout, random),
      wide(300, dim, 0.2f, GetParam().layout, random);
  ExpectSame(x.rows(num_rows), {{&narrow, 0, 150}, {&wide, 7, 1}, {&wide, 50, 0}, {&wide, 13, 70}});
}

// Sums as large as they get.
TEST_P(TernaryTiles, ExtremeCodes) {
  const int64_t num_rows = 33, dim = 6400;
  for (const int8_t code : {int8_t{-128}, int8_t{127}}) {
    std::mt19937 random(4);
    QuantizedBuffer buffer = RandomRows(num_rows, dim, random);
    const QuantizedRows x = buffer.rows(num_rows);
    for (int64_t r = 0; r < num_rows; ++r) {
      std::fill_n(x.codes + r * x.stride, dim, code);
      x.sums[r] = static_cast<int32_t>(code * dim);
    }
    const Weights weights(16, dim, 1, GetParam().layout, random);
    ExpectSame(x, {{&weights, 0, num_rows}});
  }
}

TEST_P(TernaryTiles, Experts) {
  std::mt19937 random(5);
  const int64_t dim = 150, outputs = 140;
  const std::vector<int32_t> begin = {0, 0, 1, 130, 130, 331, 338, 338};
  const int num_experts = static_cast<int>(begin.size()) - 1;
  QuantizedBuffer buffer = RandomRows(begin.back(), dim, random);
  const QuantizedRows x = buffer.rows(begin.back());
  std::vector<Weights> weights;
  std::vector<TernaryMatrix> of_experts;
  for (int e = 0; e < num_experts; ++e) {
    weights.emplace_back(outputs, dim, 0.5f + static_cast<float>(e), GetParam().layout, random);
    of_experts.push_back(weights.back().tiles.view);
  }
  std::vector<float> y(begin.back() * outputs, kGuard), expected(begin.back() * outputs, kGuard);
  std::vector<TernaryGroup> groups;
  for (int e = 0; e < num_experts; ++e) {
    groups.push_back({weights[e].panels.view, begin[e], begin[e + 1] - begin[e],
                      &expected[begin[e] * outputs], outputs, nullptr});
  }
  Executor alone = {&Threads(1)};
  Fastest().ternary_matmul({x, groups}, alone);
  cuda::ExpertTiles({.x = x,
                     .matrices = {{of_experts.data(), y.data()}},
                     .num_routes = begin.back(),
                     .begin = begin.data(),
                     .rows = outputs,
                     .num_experts = num_experts,
                     .layout = GetParam().layout},
                    GetParam().tile_rows, executor_);
  ExpectSameBits(y, expected);
}

}  // namespace
}  // namespace ternion::kernels
