#include "experts/routing.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace ternion::experts {
namespace {

using comm::DispatchPlan;

// Every expert on one to all ranks.
Placement RandomPlacement(int num_layers, int num_experts, int num_ranks, std::mt19937& random) {
  nlohmann::json layers = nlohmann::json::array();
  for (int layer = 0; layer < num_layers; ++layer) {
    nlohmann::json experts = nlohmann::json::array();
    for (int expert = 0; expert < num_experts; ++expert) {
      std::vector<int> ranks(num_ranks);
      std::iota(ranks.begin(), ranks.end(), 0);
      std::shuffle(ranks.begin(), ranks.end(), random);
      ranks.resize(random() % 2 == 0 ? 1 : 1 + random() % num_ranks);
      experts.push_back(ranks);
    }
    layers.push_back(experts);
  }
  const nlohmann::json placement = {{"layers", layers}};
  return *Placement::FromJson(placement.dump(), num_layers, num_experts, num_ranks);
}

struct Choice {
  std::vector<int32_t> experts;
  std::vector<float> weights;
  int64_t num_rows = 0;
  int top_k = 0;

  GateChoice view() const { return {experts.data(), weights.data(), num_rows, top_k}; }
};

// The weight tells row and expert apart, so that a misplaced one is seen.
Choice RandomChoice(int64_t num_rows, int num_experts, int top_k, std::mt19937& random) {
  Choice choice{{}, {}, num_rows, top_k};
  std::vector<int32_t> ids(num_experts);
  std::iota(ids.begin(), ids.end(), 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    std::shuffle(ids.begin(), ids.end(), random);
    for (int j = 0; j < top_k; ++j) {
      choice.experts.push_back(ids[j]);
      choice.weights.push_back(static_cast<float>(row * 1000 + ids[j]));
    }
  }
  return choice;
}

bool IsIn(std::span<const RankId> ranks, int rank) {
  return std::find(ranks.begin(), ranks.end(), RankId{rank}) != ranks.end();
}

// Offsets go from 0 to the end without gaps, and no entry is empty.
void CheckOffsets(const DispatchPlan& plan, int num_ranks, size_t num_routes) {
  ASSERT_EQ(plan.rank_begin.size(), static_cast<size_t>(num_ranks) + 1);
  EXPECT_EQ(plan.rank_begin[0], 0);
  EXPECT_TRUE(std::is_sorted(plan.rank_begin.begin(), plan.rank_begin.end()));
  ASSERT_EQ(plan.rank_begin.back(), static_cast<int32_t>(plan.rows.size()));
  int32_t next_route = 0;
  for (const DispatchPlan::Row& row : plan.rows) {
    EXPECT_EQ(row.first_route, next_route);
    EXPECT_GT(row.num_routes, 0);
    next_route += row.num_routes;
  }
  EXPECT_EQ(next_route, static_cast<int32_t>(plan.routes.size()));
  EXPECT_EQ(plan.routes.size(), num_routes);
}

void CheckPlan(const Placement& placement, int layer, int self, const Choice& choice,
               const DispatchPlan& plan) {
  const int num_ranks = placement.num_ranks();
  ASSERT_NO_FATAL_FAILURE(CheckOffsets(plan, num_ranks, choice.experts.size()));
  std::map<std::pair<int32_t, int32_t>, int> rank_of;  // (row, expert) -> rank
  for (int rank = 0; rank < num_ranks; ++rank) {
    int32_t last_source = -1;
    for (int32_t i = plan.rank_begin[rank]; i < plan.rank_begin[rank + 1]; ++i) {
      const DispatchPlan::Row& row = plan.rows[i];
      EXPECT_GT(row.source, last_source);  // ascending, and one entry per (row, rank)
      last_source = row.source;
      int32_t last_expert = -1;
      for (int32_t j = row.first_route; j < row.first_route + row.num_routes; ++j) {
        const int32_t expert = base::Index(plan.routes[j].expert);
        EXPECT_GT(expert, last_expert);
        last_expert = expert;
        EXPECT_EQ(plan.routes[j].weight, static_cast<float>(row.source * 1000 + expert));
        EXPECT_TRUE(rank_of.emplace(std::pair(row.source, expert), rank).second) << "sent twice";
        const auto holders = placement.RanksOf(layer, ExpertId{expert});
        EXPECT_TRUE(IsIn(holders, rank));
        EXPECT_TRUE(rank == self || !IsIn(holders, self)) << "a replica here was not used";
      }
    }
  }
  for (size_t i = 0; i < choice.experts.size(); ++i) {
    const int32_t row = static_cast<int32_t>(i / choice.top_k);
    EXPECT_EQ(rank_of.count({row, choice.experts[i]}), 1u);
  }
}

bool SamePlan(const DispatchPlan& a, const DispatchPlan& b) {
  const auto same_row = [](const DispatchPlan::Row& x, const DispatchPlan::Row& y) {
    return x.source == y.source && x.first_route == y.first_route && x.num_routes == y.num_routes;
  };
  const auto same_route = [](const comm::Route& x, const comm::Route& y) {
    return x.expert == y.expert && x.weight == y.weight;
  };
  return a.rank_begin == b.rank_begin &&
         std::equal(a.rows.begin(), a.rows.end(), b.rows.begin(), b.rows.end(), same_row) &&
         std::equal(a.routes.begin(), a.routes.end(), b.routes.begin(), b.routes.end(), same_route);
}

TEST(PlanDispatch, RandomPlacementsKeepTheInvariants) {
  std::mt19937 random(1);
  RoutingWorkspace reused;
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const int num_ranks = 1 + random() % 6;
    const int num_experts = 1 + random() % 20;
    const int top_k = 1 + random() % std::min(num_experts, 8);
    const int layer = random() % 2;
    const int self = random() % num_ranks;
    const Placement placement = RandomPlacement(2, num_experts, num_ranks, random);
    const Choice choice = RandomChoice(random() % 40, num_experts, top_k, random);
    // The same whatever was planned before.
    RoutingWorkspace fresh;
    const DispatchPlan& plan = PlanDispatch(placement, layer, RankId{self}, choice.view(), fresh);
    EXPECT_TRUE(
        SamePlan(plan, PlanDispatch(placement, layer, RankId{self}, choice.view(), reused)));
    ASSERT_NO_FATAL_FAILURE(CheckPlan(placement, layer, self, choice, plan));
    if (HasFailure()) return;
  }
}

TEST(PlanDispatch, ARowIsSentToFewRanks) {
  // Expert 0 is on rank 1 only; expert 1 could be on rank 1 or 2: the row goes to rank 1 anyway.
  const Placement placement = *Placement::FromJson(R"({"experts": [1, [1, 2]]})", 1, 2, 3);
  for (int64_t num_rows : {1, 2, 5}) {
    Choice choice{{}, {}, num_rows, 2};
    for (int64_t row = 0; row < num_rows; ++row) {
      choice.experts.insert(choice.experts.end(), {0, 1});
      choice.weights.insert(choice.weights.end(), {0.5f, 0.5f});
    }
    RoutingWorkspace workspace;
    const DispatchPlan& plan = PlanDispatch(placement, 0, RankId{0}, choice.view(), workspace);
    EXPECT_EQ(plan.rank_begin, std::vector<int32_t>({0, 0, static_cast<int32_t>(num_rows),
                                                     static_cast<int32_t>(num_rows)}));
  }
}

TEST(PlanDispatch, ExpertsWithOneHolderAreChosenFirst) {
  // Both experts of a row fit on rank 1, in whichever order the gate names them.
  const Placement placement = *Placement::FromJson(R"({"experts": [1, [1, 2]]})", 1, 2, 3);
  for (int64_t num_rows : {1, 2, 5}) {
    Choice choice{{}, {}, num_rows, 2};
    for (int64_t row = 0; row < num_rows; ++row) {
      choice.experts.insert(choice.experts.end(), {1, 0});
      choice.weights.insert(choice.weights.end(), {0.5f, 0.5f});
    }
    RoutingWorkspace workspace;
    const DispatchPlan& plan = PlanDispatch(placement, 0, RankId{0}, choice.view(), workspace);
    EXPECT_EQ(plan.rank_begin[1], 0);
    EXPECT_EQ(plan.rank_begin[2], num_rows);
    EXPECT_EQ(plan.rank_begin[3], num_rows);
  }
}

// Inside a node the same rules hold.
TEST(PlanFanOut, ReplicasAreChosenWhereTheRowIsAnyway) {
  const LayerRanks seats = {{RankId{0}}, {RankId{0}, RankId{1}}, {RankId{1}, RankId{2}}, {}};
  comm::ReceivedRows rows;
  const auto add_row = [&](const std::vector<int>& experts) {
    rows.rows.push_back({.first_route = static_cast<int32_t>(rows.routes.size()),
                         .num_routes = static_cast<int32_t>(experts.size())});
    for (int expert : experts) rows.routes.push_back({base::ExpertId{expert}, 0.5f});
  };
  add_row({0, 1});  // both at seat 0
  add_row({1, 2});  // one at seat 2, which is ours
  RoutingWorkspace workspace;
  const auto plan = PlanFanOut(seats, 3, RankId{2}, rows, workspace);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const DispatchPlan& made = **plan;
  ASSERT_EQ(made.rows[0].source, 0);
  EXPECT_EQ(made.rows[0].num_routes, 2);
  EXPECT_EQ(made.rank_begin[3] - made.rank_begin[2], 1);
  EXPECT_EQ(made.rows.back().source, 1);
  EXPECT_EQ(made.routes[made.rows.back().first_route].expert, base::ExpertId{2});
  add_row({3});
  EXPECT_EQ(PlanFanOut(seats, 3, RankId{2}, rows, workspace).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(PlanDispatch, ReplicasOfDifferentExpertsTakeTurnsApart) {
  // One row per rank, as in decoding: equally loved experts must not all go to the first replica.
  const Placement placement =
      *Placement::FromJson(R"({"experts": [[1, 2], [1, 2], [1, 2], [1, 2]]})", 1, 4, 3);
  std::vector<int32_t> rows_of(3, 0);
  for (int32_t expert = 0; expert < 4; ++expert) {
    const Choice choice{{expert}, {1.0f}, 1, 1};
    RoutingWorkspace workspace;
    const DispatchPlan& plan = PlanDispatch(placement, 0, RankId{0}, choice.view(), workspace);
    for (int rank = 0; rank < 3; ++rank) {
      rows_of[rank] += plan.rank_begin[rank + 1] - plan.rank_begin[rank];
    }
  }
  EXPECT_EQ(rows_of, std::vector<int32_t>({0, 2, 2}));
}

TEST(PlanDispatch, ReplicasShareTheLoad) {
  const Placement placement = *Placement::FromJson(R"({"experts": [[1, 2, 3]]})", 1, 1, 4);
  const Choice choice{std::vector<int32_t>(9, 0), std::vector<float>(9, 1.0f), 9, 1};
  RoutingWorkspace workspace;
  const DispatchPlan& plan = PlanDispatch(placement, 0, RankId{0}, choice.view(), workspace);
  EXPECT_EQ(plan.rank_begin, std::vector<int32_t>({0, 0, 3, 6, 9}));
}

}  // namespace
}  // namespace ternion::experts
