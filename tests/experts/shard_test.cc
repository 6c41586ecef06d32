#include "experts/shard.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/experts/expert_support.h"

namespace ternion::experts {
namespace {

struct Shape {
  int64_t hidden;
  int64_t intermediate;
  int num_experts;
  int num_rows;
  kernels::Activation activation;
  bool sub_norm;
};

const Shape kShapes[] = {
    {64, 48, 4, 17, kernels::Activation::kSilu, true},
    {130, 33, 9, 40, kernels::Activation::kRelu2, false},
    {7, 5, 1, 3, kernels::Activation::kSilu, false},
    {64, 16, 5, 0, kernels::Activation::kSilu, true},
};

// A shard that holds two thirds of the experts, and rows for them.
class ShardCase {
 public:
  explicit ShardCase(const Shape& shape) : shape_(shape), shard_(shape.num_experts) {
    std::mt19937 random(shape.hidden);
    sub_norm_ = RandomFloats(shape.intermediate, random);
    for (int expert = 0; expert < shape.num_experts; ++expert) {
      if (expert % 3 == 2) continue;
      held_.push_back(expert);
      const bool sparse = shape.activation == kernels::Activation::kRelu2;
      shard_.Set(ExpertId{expert}, MakeExpert(0, expert, shape.hidden, shape.intermediate, sparse));
    }
    MakeRows(random);
  }

  FfnConfig config() const {
    return {shape_.hidden, shape_.intermediate, shape_.activation,
            shape_.sub_norm ? sub_norm_.data() : nullptr, 1e-5f};
  }
  const ExpertShard& shard() const { return shard_; }
  const comm::ReceivedRows& received() const { return received_; }
  int64_t num_routes() const { return received_.routes.size(); }

  std::vector<float> Run(const char* isa, int num_threads, bool presum, int64_t max_routes) const {
    base::ThreadPool threads(num_threads);
    kernels::Executor executor{.threads = &threads};
    ShardWorkspace workspace(max_routes, shape_.hidden, shape_.intermediate);
    const size_t num_outputs = presum ? received_.rows.size() : received_.routes.size();
    // What was there before must not matter.
    std::vector<float> outputs(num_outputs * shape_.hidden, 1e30f);
    const FfnConfig ffn = config();
    const ShardWork work = {&ffn, &received_, presum, outputs.data()};
    EXPECT_TRUE(shard_.Run(*kernels::SelectCpuKernels(isa), executor, work, workspace).ok());
    return outputs;
  }

  // One route after the other.
  std::vector<float> Expected(bool presum) const {
    base::ThreadPool threads(1);
    kernels::Executor executor{.threads = &threads};
    std::vector<float> expected;
    for (const comm::ReceivedRow& row : received_.rows) {
      std::vector<float> sum(shape_.hidden);
      for (int32_t i = row.first_route; i < row.first_route + row.num_routes; ++i) {
        const comm::Route& route = received_.routes[i];
        const FfnWeights weights =
            MakeExpert(0, base::Index(route.expert), shape_.hidden, shape_.intermediate);
        const std::vector<float> y = RunExpertAlone(*kernels::SelectCpuKernels("scalar"), executor,
                                                    config(), weights, row.codes, row.scale);
        if (presum) {
          AddScaled(y, route.weight, sum.data());
        } else {
          expected.insert(expected.end(), y.begin(), y.end());
        }
      }
      if (presum) expected.insert(expected.end(), sum.begin(), sum.end());
    }
    return expected;
  }

 private:
  void MakeRows(std::mt19937& random) {
    codes_.resize(shape_.num_rows * shape_.hidden);
    for (int8_t& code : codes_) code = static_cast<int8_t>(random() % 255 - 127);
    for (int row = 0; row < shape_.num_rows; ++row) {
      std::vector<int> experts = held_;
      std::shuffle(experts.begin(), experts.end(), random);
      experts.resize(1 + random() % experts.size());
      std::sort(experts.begin(), experts.end());
      received_.rows.push_back(
          {&codes_[row * shape_.hidden], 0.01f + static_cast<float>(random() % 100) / 1000.0f,
           static_cast<int32_t>(received_.routes.size()), static_cast<int32_t>(experts.size())});
      for (int expert : experts) {
        const float weight = static_cast<float>(random() % 1000) / 999.0f;
        received_.routes.push_back({ExpertId{expert}, weight});
      }
    }
  }

  const Shape shape_;
  ExpertShard shard_;
  std::vector<float> sub_norm_;
  std::vector<int> held_;
  std::vector<int8_t> codes_;
  comm::ReceivedRows received_;
};

class ShardTest : public ::testing::TestWithParam<Shape> {};

TEST_P(ShardTest, EqualsOneRouteAfterTheOther) {
  const ShardCase c(GetParam());
  for (const bool presum : {true, false}) {
    const std::vector<float> expected = c.Expected(presum);
    for (const char* isa : kernels::AvailableIsas()) {
      SCOPED_TRACE(std::string(isa) + (presum ? ", presum" : ", exact"));
      EXPECT_EQ(c.Run(isa, 2, presum, 4096), expected);
    }
  }
}

TEST_P(ShardTest, ChunksDoNotChangeTheBits) {
  const ShardCase c(GetParam());
  for (const bool presum : {true, false}) {
    const std::vector<float> whole = c.Run("", 1, presum, std::max<int64_t>(1, c.num_routes()));
    for (const int64_t max_routes : {1, 2, 3, 7, 16}) {
      SCOPED_TRACE(max_routes);
      EXPECT_EQ(c.Run("", 2, presum, max_routes), whole);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ShardTest, ::testing::ValuesIn(kShapes));

TEST(Shard, HoldsWhatWasSet) {
  const ShardCase c(kShapes[0]);
  EXPECT_TRUE(c.shard().Holds(ExpertId{0}));
  EXPECT_TRUE(c.shard().Holds(ExpertId{3}));
  EXPECT_FALSE(c.shard().Holds(ExpertId{2}));
}

// One workspace serves many layers with different rows.
TEST(Shard, WorkspaceIsReused) {
  const ShardCase many(kShapes[0]);
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  ShardWorkspace workspace(8, 64, 48);
  const kernels::Kernels& table = *kernels::SelectCpuKernels("");
  const FfnConfig config = many.config();
  for (const bool presum : {false, true, false}) {
    const std::vector<float> expected = many.Expected(presum);
    std::vector<float> outputs(expected.size());
    const ShardWork work = {&config, &many.received(), presum, outputs.data()};
    EXPECT_TRUE(many.shard().Run(table, executor, work, workspace).ok());
    EXPECT_EQ(outputs, expected);
    const comm::ReceivedRows none;
    EXPECT_TRUE(many.shard().Run(table, executor, {&config, &none, presum}, workspace).ok());
  }
}

TEST(Shard, LooksUpBetweenExperts) {
  const ShardCase c(kShapes[0]);
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  ShardWorkspace workspace(4096, 64, 48);
  workspace.bytes_between = 1;
  const kernels::Kernels& table = *kernels::SelectCpuKernels("");
  const FfnConfig config = c.config();
  const std::vector<float> expected = c.Expected(true);
  std::vector<float> outputs(expected.size());
  int calls = 0;
  absl::Status outcome;
  const auto look = [&] { return ++calls, outcome; };
  const absl::FunctionRef<absl::Status()> between = look;
  const ShardWork work = {&config, &c.received(), true, outputs.data(), &between};
  EXPECT_TRUE(c.shard().Run(table, executor, work, workspace).ok());
  EXPECT_EQ(outputs, expected);
  EXPECT_EQ(calls, c.shard().num_experts_here() - 1);
  outcome = absl::UnavailableError("rank 7 is gone");
  EXPECT_EQ(c.shard().Run(table, executor, work, workspace), outcome);
}

// relu2 skips codes when up and down lie in lines; the results are the same bits. Few and many
// rows.
TEST(RunFfn, SkippingCodesChangesNothing) {
  std::mt19937 random(5);
  for (const auto& [hidden, intermediate] : {std::pair<int64_t, int64_t>{300, 270}, {64, 33}}) {
    const FfnWeights dense = MakeExpert(0, 1, hidden, intermediate);
    const FfnWeights sparse = MakeExpert(0, 1, hidden, intermediate, /*sparse=*/true);
    const std::vector<float> sub_norm = RandomFloats(intermediate, random);
    for (int64_t num_rows : {1, 3, 20, 70}) {
      const std::vector<float> x = RandomFloats(num_rows * hidden, random);
      kernels::QuantizedBuffer codes(num_rows, hidden);
      FfnWorkspace workspace(num_rows, intermediate);
      const auto run = [&](const char* isa, const FfnWeights& weights,
                           kernels::Activation activation) {
        base::ThreadPool threads(2);
        kernels::Executor executor{.threads = &threads};
        const kernels::Kernels& table = *kernels::SelectCpuKernels(isa);
        table.quantize({.x = x.data(), .out = codes.rows(num_rows), .x_stride = hidden}, executor);
        const FfnGroup groups[] = {{&weights, 0, num_rows / 2},
                                   {&weights, num_rows / 2, num_rows - num_rows / 2}};
        std::vector<float> y(num_rows * hidden);
        RunFfn(table, executor, {hidden, intermediate, activation, sub_norm.data(), 1e-5f},
               codes.rows(num_rows), groups, workspace, y.data());
        return y;
      };
      for (auto activation : {kernels::Activation::kSilu, kernels::Activation::kRelu2}) {
        const std::vector<float> expected = run("scalar", dense, activation);
        for (const char* isa : kernels::AvailableIsas()) {
          EXPECT_EQ(run(isa, dense, activation), expected) << isa << ", " << num_rows << " rows";
          EXPECT_EQ(run(isa, sparse, activation), expected) << isa << ", " << num_rows << " rows";
        }
      }
    }
  }
}

}  // namespace
}  // namespace ternion::experts
