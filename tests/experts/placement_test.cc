#include "experts/placement.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/status.h"

namespace ternion::experts {
namespace {

using test::IsInvalid;

std::vector<int> Ints(const auto& ids) {
  std::vector<int> ints;
  for (auto id : ids) ints.push_back(base::Index(id));
  return ints;
}

std::vector<int> RanksOf(const Placement& placement, int layer, int expert) {
  return Ints(placement.RanksOf(layer, ExpertId{expert}));
}

std::vector<int> ExpertsOf(const Placement& placement, int layer, int rank) {
  return Ints(placement.ExpertsOf(layer, RankId{rank}));
}

TEST(Contiguous, EveryExpertOnceInOrderAndBalanced) {
  for (int num_experts : {1, 2, 7, 8, 16, 60, 128}) {
    for (int num_ranks : {1, 2, 3, 5, 8, 130}) {
      SCOPED_TRACE(std::to_string(num_experts) + " experts on " + std::to_string(num_ranks));
      const Placement placement = Placement::Contiguous(3, num_experts, num_ranks);
      for (int layer = 0; layer < 3; ++layer) {
        std::vector<int> all;
        size_t fewest = num_experts, most = 0;
        for (int rank = 0; rank < num_ranks; ++rank) {
          const std::vector<int> here = ExpertsOf(placement, layer, rank);
          all.insert(all.end(), here.begin(), here.end());
          fewest = std::min(fewest, here.size());
          most = std::max(most, here.size());
        }
        std::vector<int> expected(num_experts);
        std::iota(expected.begin(), expected.end(), 0);
        EXPECT_EQ(all, expected);
        EXPECT_LE(most - fewest, 1u);
      }
    }
  }
}

TEST(FromJson, OneListForAllLayers) {
  const auto placement = Placement::FromJson(R"({"experts": [3, [2, 0], 0, [0]]})", 2, 4, 4);
  ASSERT_TRUE(placement.ok()) << placement.status();
  EXPECT_EQ(placement->num_layers(), 2);
  EXPECT_EQ(placement->num_experts(), 4);
  EXPECT_EQ(placement->num_ranks(), 4);
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(RanksOf(*placement, layer, 0), std::vector<int>({3}));
    EXPECT_EQ(RanksOf(*placement, layer, 1), std::vector<int>({0, 2}));  // ascending
    EXPECT_EQ(ExpertsOf(*placement, layer, 0), std::vector<int>({1, 2, 3}));
    EXPECT_EQ(ExpertsOf(*placement, layer, 1), std::vector<int>());
    EXPECT_EQ(ExpertsOf(*placement, layer, 2), std::vector<int>({1}));
    EXPECT_TRUE(placement->Holds(layer, ExpertId{1}, RankId{2}));
    EXPECT_FALSE(placement->Holds(layer, ExpertId{1}, RankId{1}));
  }
}

TEST(FromJson, AListPerLayer) {
  const auto placement = Placement::FromJson(R"({"layers": [[0, 1], [1, [0, 1]]]})", 2, 2, 2);
  ASSERT_TRUE(placement.ok()) << placement.status();
  EXPECT_EQ(ExpertsOf(*placement, 0, 0), std::vector<int>({0}));
  EXPECT_EQ(ExpertsOf(*placement, 0, 1), std::vector<int>({1}));
  EXPECT_EQ(ExpertsOf(*placement, 1, 0), std::vector<int>({1}));
  EXPECT_EQ(ExpertsOf(*placement, 1, 1), std::vector<int>({0, 1}));
}

TEST(FromJson, MalformedIsAClearError) {
  struct Case {
    const char* json;
    const char* expected;
  };
  const Case cases[] = {
      {"", "JSON object"},
      {"{\"experts\": [0, 1", "JSON object"},
      {"[0, 1]", "JSON object"},
      {"{}", "\"experts\" or \"layers\""},
      {R"({"experts": [0, 1], "layers": [[0, 1], [0, 1]]})", "\"experts\" or \"layers\""},
      {R"({"experts": 0})", "one array"},
      {R"({"experts": {"0": 0}})", "one array"},
      {R"({"experts": [0]})", "layer 0: expected 2 experts, found 1"},
      {R"({"experts": [0, 1, 0]})", "layer 0: expected 2 experts, found 3"},
      {R"({"layers": [[0, 1]]})", "each of 2 layers"},
      {R"({"layers": [[0, 1], [0, 1], [0, 1]]})", "each of 2 layers"},
      {R"({"layers": [[0, 1], 0]})", "layer 1: expected 2 experts, found 0"},
      {R"({"layers": [[0, 1], [0]]})", "layer 1: expected 2 experts, found 1"},
      {R"({"experts": [0, 3]})", "layer 0, expert 1: names rank 3, but ranks are 0 to 2"},
      {R"({"layers": [[0, 1], [[0, 4], 1]]})", "layer 1, expert 0: names rank 4"},
      {R"({"experts": [-1, 0]})", "expert 0: names rank -1"},
      {R"({"experts": [4294967296, 0]})", "expert 0: names rank 4294967296"},
      {R"({"experts": [18446744073709551615, 0]})", "expert 0: names rank"},
      {R"({"experts": [0, 1.0]})", "expert 1: a rank must be an integer, not 1.0"},
      {R"({"experts": [0, 1e300]})", "expert 1: a rank must be an integer"},
      {R"({"experts": [0, "1"]})", "expert 1: a rank must be an integer, not \"1\""},
      {R"({"experts": [0, null]})", "expert 1: a rank must be an integer, not null"},
      {R"({"experts": [0, true]})", "expert 1: a rank must be an integer, not true"},
      {R"({"experts": [0, [[1]]]})", "expert 1: a rank must be an integer, not [1]"},
      {R"({"experts": [0, []]})", "expert 1: has no rank"},
      {R"({"experts": [0, [1, 2, 1]]})", "expert 1: names a rank twice"},
  };
  for (const Case& c : cases) {
    EXPECT_TRUE(IsInvalid(Placement::FromJson(c.json, 2, 2, 3).status(), c.expected)) << c.json;
  }
}

TEST(ToJson, ComesBackAsItWas) {
  const std::string text = R"({"layers":[[0,[0,2],1],[[0,1,2],1,2]]})";
  const auto placement = Placement::FromJson(text, 2, 3, 3);
  ASSERT_TRUE(placement.ok()) << placement.status();
  EXPECT_EQ(placement->ToJson(), text);
}

TEST(FromLayers, HoldsWhatItWasGiven) {
  const Placement placement =
      Placement::FromLayers({{{RankId{1}}, {RankId{0}, RankId{2}}}, {{RankId{2}}, {RankId{2}}}}, 3);
  EXPECT_EQ(placement.ToJson(), R"({"layers":[[1,[0,2]],[2,2]]})");
  EXPECT_EQ(placement.num_ranks(), 3);
}

}  // namespace
}  // namespace ternion::experts
