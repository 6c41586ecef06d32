#include "kernels/cuda/ternary_schedule.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::kernels {
namespace {

// begin[] of experts of which many have no rows, some a few and some a lot.
std::vector<int32_t> RandomBegin(int num_experts, std::mt19937& random) {
  std::vector<int32_t> begin = {0};
  for (int e = 0; e < num_experts; ++e) {
    const int32_t most[] = {1, 40, 129, 1000};
    begin.push_back(begin.back() + static_cast<int32_t>(random() % most[random() % 4]));
  }
  return begin;
}

TEST(TileOfSlot, EveryRowIsInOneTileOfItsExpert) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const int num_experts = 1 + static_cast<int>(random() % 70);
    const int tile_rows = kMinTileRows << random() % 3;
    const std::vector<int32_t> begin = RandomBegin(num_experts, random);
    std::vector<int> seen(begin.back());
    for (int64_t slot = 0; slot < NumTileSlots(begin.back(), num_experts, tile_rows); ++slot) {
      const RowTile tile =
          TileOfSlot(static_cast<int32_t>(slot), begin.data(), num_experts, tile_rows);
      ASSERT_LE(tile.num_rows, tile_rows);
      if (tile.num_rows == 0) continue;
      ASSERT_GE(tile.first, begin[tile.expert]);
      ASSERT_LE(tile.first + tile.num_rows, begin[tile.expert + 1]);
      for (int32_t i = 0; i < tile.num_rows; ++i) ++seen[tile.first + i];
    }
    ASSERT_EQ(std::count(seen.begin(), seen.end(), 1), begin.back()) << "trial " << trial;
  }
}

// No expert has more tiles than it needs.
TEST(TileOfSlot, TilesAreFullButTheLast) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 100; ++trial) {
    const int num_experts = 1 + static_cast<int>(random() % 70);
    const std::vector<int32_t> begin = RandomBegin(num_experts, random);
    std::vector<int64_t> tiles(num_experts);
    for (int64_t slot = 0; slot < NumTileSlots(begin.back(), num_experts, 64); ++slot) {
      const RowTile tile = TileOfSlot(static_cast<int32_t>(slot), begin.data(), num_experts, 64);
      if (tile.num_rows > 0) ++tiles[tile.expert];
    }
    for (int e = 0; e < num_experts; ++e) {
      EXPECT_EQ(tiles[e], base::CeilDiv(begin[e + 1] - begin[e], 64)) << e;
    }
  }
}

TEST(TileRowsFor, AreTheMostThatGiveEnoughTiles) {
  EXPECT_EQ(TileRowsFor(1), kMinTileRows);
  EXPECT_EQ(TileRowsFor(kEnoughTiles / 2 - 1), kMinTileRows);
  EXPECT_EQ(TileRowsFor(kEnoughTiles / 2), kMaxTileRows / 2);
  EXPECT_EQ(TileRowsFor(kEnoughTiles - 1), kMaxTileRows / 2);
  EXPECT_EQ(TileRowsFor(kEnoughTiles), kMaxTileRows);
}

// Every wanted group that has rows is in one launch, with none too large for what it was told.
TEST(ForGroups, LaunchesWantedGroupsOnce) {
  std::mt19937 random(3);
  for (const int count : {0, 1, 5, 31, 32, 33, 64, 100}) {
    std::vector<TernaryGroup> groups(count);
    std::vector<int64_t> wanted, launched;
    for (int i = 0; i < count; ++i) {
      groups[i].weights.rows = static_cast<int64_t>(random() % 300);
      groups[i].num_rows = static_cast<int64_t>(random() % 5);
      groups[i].row_begin = i;
      if (groups[i].num_rows >= 2) wanted.push_back(i);
    }
    ForGroups(
        groups, [](const TernaryGroup& group) { return group.num_rows != 1; },
        [&](const TernaryGroups& launch) {
          ASSERT_GT(launch.count, 0);
          int32_t panels = 0;
          for (int i = 0; i < launch.count; ++i) {
            for (int32_t p = 0; p < launch.group[i].weights.num_panels(); ++p, ++panels) {
              EXPECT_EQ(launch.PanelAt(panels).group, i);
              EXPECT_EQ(launch.PanelAt(panels).panel, p);
            }
            launched.push_back(launch.group[i].row_begin);
            EXPECT_LE(launch.group[i].num_rows, launch.max_rows);
            EXPECT_LE(launch.group[i].weights.num_panels(), launch.max_panels);
          }
          EXPECT_EQ(launch.num_panels(), panels);
        });
    EXPECT_EQ(launched, wanted);
  }
}

}  // namespace
}  // namespace ternion::kernels
