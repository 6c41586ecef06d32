#include "experts/moe_layer.h"

#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/status.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "nlohmann/json.hpp"
#include "tests/experts/expert_support.h"
#include "tests/testing/status.h"

namespace ternion::experts {
namespace {

using test::IsError;

constexpr int64_t kHidden = 100;
constexpr int64_t kInner = 36;
constexpr int kExperts = 11;
constexpr int kTopK = 3;
constexpr int kLayers = 3;
constexpr int kRows = 23;  // of the whole world
constexpr float kEps = 1e-5f;

// Three layers over one world. `owner` gives the rank of each of the world's rows.
struct MoeCase {
  int num_ranks = 1;
  std::string placement = "";  // JSON; empty: contiguous
  std::vector<int> owner = {};
  bool exact = true;
  comm::RowFormat dispatch = comm::RowFormat::kInt8;
  comm::RowFormat combine = comm::RowFormat::kFp32;
  bool renormalize = true;
};

// The gate, [kExperts, kHidden]; enough of it to spread the rows.
std::vector<float> GateWeights(int layer) {
  std::mt19937 random(77 + layer);
  return RandomFloats(kExperts * kHidden, random);
}

std::vector<float> SubNorm(int layer) {
  std::mt19937 random(99 + layer);
  return RandomFloats(kInner, random);
}

std::vector<float> WorldRows() {
  std::mt19937 random(5);
  return RandomFloats(kRows * kHidden, random);
}

FfnConfig ConfigOf(const std::vector<float>& sub_norm) {
  return {kHidden, kInner, kernels::Activation::kSilu, sub_norm.data(), kEps};
}

absl::StatusOr<Placement> PlacementOf(const std::string& json, int num_ranks) {
  if (json.empty()) return Placement::Contiguous(kLayers, kExperts, num_ranks);
  return Placement::FromJson(json, kLayers, kExperts, num_ranks);
}

// This rank's part of the layers. `hidden` [its rows, kHidden] goes through all of them.
absl::Status RunRank(const MoeCase& c, const Placement& placement, const Placement& held,
                     comm::Transport& transport, std::vector<float>& hidden) {
  const int64_t num_rows = hidden.size() / kHidden;
  base::ThreadPool threads(1 + base::Index(transport.rank()) % 2);
  kernels::Executor executor{.threads = &threads};
  const kernels::Kernels& kernels = *kernels::SelectCpuKernels("");
  const comm::ExchangeOptions options = {.dispatch = c.dispatch,
                                         .combine = c.combine,
                                         .presum = !c.exact,
                                         .hidden = kHidden,
                                         .max_rows = kRows,
                                         .top_k = kTopK,
                                         .num_experts = kExperts};
  TERNION_RETURN_IF_ERROR(comm::ValidateExchangeOptions(options));
  MoeContext context({kExperts, kTopK, c.renormalize}, options, kInner, &transport, &kernels,
                     &executor);
  kernels::QuantizedBuffer codes(kRows, kHidden);
  std::vector<float> normed(kRows * kHidden);
  const std::vector<float> norm(kHidden, 1.0f);
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::vector<float> gate = GateWeights(layer), sub_norm = SubNorm(layer);
    MoeLayerWeights weights;
    weights.gate = {gate.data(), kernels::DenseType::kFp32, kExperts, kHidden};
    weights.ffn = ConfigOf(sub_norm);
    weights.shard = ExpertShard(kExperts);
    for (ExpertId expert : held.ExpertsOf(layer, transport.rank())) {
      weights.shard.Set(expert, MakeExpert(layer, base::Index(expert), kHidden, kInner));
    }
    const kernels::QuantizedRows x = codes.rows(num_rows);
    kernels.quantize({.x = hidden.data(),
                      .weight = norm.data(),
                      .normed = normed.data(),
                      .out = x,
                      .x_stride = kHidden,
                      .eps = kEps},
                     executor);
    MicroBatch& batch = context.micro_batches[layer % 2];
    const MoeInput input = {x, normed.data(), 4, static_cast<uint32_t>(layer)};
    TERNION_RETURN_IF_ERROR(MoeDispatch(weights, placement, input, context, batch));
    TERNION_RETURN_IF_ERROR(MoeExperts(weights, context, batch, nullptr));
    TERNION_RETURN_IF_ERROR(MoeCombine(weights, context, batch, hidden.data()));
  }
  return absl::OkStatus();
}

// The world's rows [kRows, kHidden] after all layers.
std::vector<float> RunWorld(const MoeCase& c) {
  const absl::StatusOr<Placement> placement = PlacementOf(c.placement, c.num_ranks);
  EXPECT_TRUE(placement.ok()) << placement.status();
  std::vector<float> world = WorldRows();
  const auto body = [&](comm::Transport& transport) -> absl::Status {
    const auto for_own_rows = [&](auto visit) {
      for (int row = 0; row < kRows; ++row) {
        if (c.owner[row] == base::Index(transport.rank())) visit(&world[row * kHidden]);
      }
    };
    std::vector<float> own;
    for_own_rows([&](float* row) { own.insert(own.end(), row, row + kHidden); });
    TERNION_RETURN_IF_ERROR(RunRank(c, *placement, *placement, transport, own));
    const float* next = own.data();
    for_own_rows([&](float* row) {
      std::memcpy(row, next, kHidden * sizeof(float));
      next += kHidden;
    });
    return absl::OkStatus();
  };
  for (const absl::Status& status : comm::RunLoopback(c.num_ranks, body)) {
    EXPECT_TRUE(status.ok()) << status;
  }
  return world;
}

// What the layers give, row by row and expert by expert, without ranks.
std::vector<float> Expected() {
  const kernels::Kernels& kernels = *kernels::SelectCpuKernels("scalar");
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  std::vector<float> world = WorldRows();
  kernels::QuantizedBuffer codes(1, kHidden);
  std::vector<float> normed(kHidden), logits(kExperts), weights(kTopK);
  const std::vector<float> norm(kHidden, 1.0f);
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::vector<float> gate = GateWeights(layer), sub_norm = SubNorm(layer);
    for (int row = 0; row < kRows; ++row) {
      float* hidden = &world[row * kHidden];
      const kernels::QuantizedRows x = codes.rows(1);
      kernels.quantize({.x = hidden,
                        .weight = norm.data(),
                        .normed = normed.data(),
                        .out = x,
                        .x_stride = kHidden,
                        .eps = kEps},
                       executor);
      kernels.dense_matmul({.x = normed.data(),
                            .weights = {gate.data(), kernels::DenseType::kFp32, kExperts, kHidden},
                            .y = logits.data(),
                            .num_rows = 1,
                            .x_stride = kHidden,
                            .y_stride = kExperts},
                           executor);
      std::vector<int32_t> ids(kTopK);
      kernels.gate_top_k({.logits = logits.data(),
                          .ids = ids.data(),
                          .weights = weights.data(),
                          .num_rows = 1,
                          .num_experts = kExperts,
                          .k = kTopK,
                          .renormalize = true},
                         executor);
      for (int expert = 0; expert < kExperts; ++expert) {
        for (int j = 0; j < kTopK; ++j) {
          if (ids[j] != expert) continue;
          const FfnWeights ffn = MakeExpert(layer, expert, kHidden, kInner);
          AddScaled(
              RunExpertAlone(kernels, executor, ConfigOf(sub_norm), ffn, x.codes, x.scales[0]),
              weights[j], hidden);
        }
      }
    }
  }
  return world;
}

// Rows dealt out at random; `idle` ranks get none.
std::vector<int> RandomOwners(int num_ranks, int idle, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int> owner(kRows);
  for (int& rank : owner) rank = idle + random() % (num_ranks - idle);
  return owner;
}

struct NamedPlacement {
  std::string name;
  std::string json;  // with ranks 0 .. num_ranks - 1
};

std::vector<NamedPlacement> Placements(int num_ranks) {
  using Json = nlohmann::json;
  std::vector<int> all(num_ranks);
  std::iota(all.begin(), all.end(), 0);
  const int last = num_ranks - 1;
  Json odd_on_last = Json::array(), on_last = Json::array();
  Json everywhere = Json::array(), mixed = Json::array();
  for (int expert = 0; expert < kExperts; ++expert) {
    odd_on_last.push_back(expert % 2 == 1 ? last : 0);
    on_last.push_back(last);
    everywhere.push_back(all);
    mixed.push_back(expert % 3 == 0 ? Json(all) : Json(expert * 7 % num_ranks));
  }
  const auto text = [](const Json& experts) { return Json{{"experts", experts}}.dump(); };
  return {{"contiguous", ""},
          {"odd on last", text(odd_on_last)},
          {"all on last", text(on_last)},
          {"everywhere", text(everywhere)},
          {"mixed", text(mixed)}};
}

TEST(MoeLayer, OneRankEqualsOneExpertAfterTheOther) {
  EXPECT_EQ(RunWorld({.owner = std::vector<int>(kRows, 0)}), Expected());
}

TEST(MoeLayer, ExactWireGivesTheSameBitsOnAnyWorld) {
  const std::vector<float> expected = RunWorld({.owner = std::vector<int>(kRows, 0)});
  for (int num_ranks = 1; num_ranks <= 5; ++num_ranks) {
    for (const NamedPlacement& placement : Placements(num_ranks)) {
      for (int idle = 0; idle < std::min(num_ranks, 3); ++idle) {
        for (const comm::RowFormat dispatch : {comm::RowFormat::kInt8, comm::RowFormat::kFp32}) {
          SCOPED_TRACE(std::to_string(num_ranks) + " ranks, " + placement.name + ", " +
                       std::to_string(idle) + " idle, dispatch " +
                       std::string(comm::RowFormatName(dispatch)));
          EXPECT_EQ(RunWorld({.num_ranks = num_ranks,
                              .placement = placement.json,
                              .owner = RandomOwners(num_ranks, idle, num_ranks),
                              .dispatch = dispatch}),
                    expected);
        }
      }
    }
  }
}

TEST(MoeLayer, Int8DispatchIsLossless) {
  for (int num_ranks = 1; num_ranks <= 4; ++num_ranks) {
    for (const comm::RowFormat combine : {comm::RowFormat::kBf16, comm::RowFormat::kInt8}) {
      MoeCase c = {.num_ranks = num_ranks,
                   .owner = RandomOwners(num_ranks, 0, 9),
                   .exact = false,
                   .combine = combine};
      const std::vector<float> int8 = RunWorld(c);
      c.dispatch = comm::RowFormat::kFp32;
      EXPECT_EQ(RunWorld(c), int8) << num_ranks << " ranks";
    }
  }
}

// The wires that round come close to the exact one.
TEST(MoeLayer, PresumIsCloseToExact) {
  const std::vector<float> exact = Expected();
  const std::vector<float> presum = RunWorld({.num_ranks = 3,
                                              .owner = RandomOwners(3, 1, 2),
                                              .exact = false,
                                              .combine = comm::RowFormat::kFp32});
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += (presum[i] - exact[i]) * (presum[i] - exact[i]);
    size += exact[i] * exact[i];
  }
  // A sum in another order flips a code now and then, which the next layers carry on.
  EXPECT_LT(error, 1e-3 * size);
}

// Rank 0 believes that rank 1 holds everything; rank 1 holds nothing.
TEST(MoeLayer, RowsForAnExpertThatIsNotHereAreAnError) {
  const nlohmann::json zeros = {{"experts", std::vector<int>(kExperts, 0)}};
  const nlohmann::json ones = {{"experts", std::vector<int>(kExperts, 1)}};
  const Placement believed = *PlacementOf(ones.dump(), 2);
  const Placement held = *PlacementOf(zeros.dump(), 2);
  const std::vector<absl::Status> statuses =
      comm::RunLoopback(2, [&](comm::Transport& transport) -> absl::Status {
        std::vector<float> own = WorldRows();
        own.resize(transport.rank() == RankId{0} ? 2 * kHidden : 0);
        return RunRank({.num_ranks = 2}, believed, held, transport, own);
      });
  EXPECT_TRUE(IsError(statuses[0], absl::StatusCode::kUnavailable, "rank 1 is gone"));
  EXPECT_TRUE(test::IsInvalid(statuses[1], "which is not placed on this rank"));
}

}  // namespace
}  // namespace ternion::experts
