// How the ternary product is cut up: groups of one launch, and tiles of rows. Plain arithmetic, for
// the device and for the host.
#pragma once

#include <cstdint>
#include <span>

#include "base/checked.h"
#include "kernels/kernels.h"

namespace ternion::kernels {

// As many groups as fit into the parameters of one launch.
struct TernaryGroups {
  static constexpr int kMax = 32;
  TernaryGroup group[kMax];
  int32_t end_panel[kMax] = {};  // of the groups' panels, one behind the other
  int count = 0;
  int64_t max_panels = 0;  // of a group
  int64_t max_rows = 0;    // of x

  struct Panel {
    int group = 0;
    int32_t panel = 0;  // of the group
  };
  constexpr int32_t num_panels() const { return end_panel[count - 1]; }
  constexpr Panel PanelAt(int32_t i) const {
    int g = 0;
    while (i >= end_panel[g]) ++g;
    return {g, g == 0 ? i : i - end_panel[g - 1]};
  }
};

// launch(groups) until all groups that `wanted` says yes to have been in one.
template <typename Wanted, typename Launch>
void ForGroups(std::span<const TernaryGroup> left, Wanted wanted, Launch launch) {
  while (!left.empty()) {
    TernaryGroups groups;
    for (; !left.empty() && groups.count < TernaryGroups::kMax; left = left.subspan(1)) {
      const TernaryGroup& group = left.front();
      if (group.num_rows == 0 || !wanted(group)) continue;
      const int64_t panels = group.weights.num_panels();
      const int32_t end = static_cast<int32_t>(panels);
      groups.end_panel[groups.count] = groups.count == 0 ? end : groups.num_panels() + end;
      groups.group[groups.count++] = group;
      groups.max_panels = panels > groups.max_panels ? panels : groups.max_panels;
      groups.max_rows = group.num_rows > groups.max_rows ? group.num_rows : groups.max_rows;
    }
    if (groups.count > 0) launch(groups);
  }
}

// Which row of x a product's row is: those from `first` on, or the rows that the routes from there
// on are of (ExpertMatmulArgs).
struct RowMap {
  int64_t first = 0;
  const int32_t* order = nullptr;
  int k = 1;

  constexpr int64_t operator()(int64_t row) const {
    return order == nullptr ? first + row : order[first + row] / k;
  }
};

// A tile is kTilePanels panels times some rows of x.
inline constexpr int kTilePanels = 8;
inline constexpr int kMinTileRows = 32;
inline constexpr int kMaxTileRows = 128;

// Two blocks for each of a large GPU's multiprocessors.
inline constexpr int64_t kEnoughTiles = 256;

// The largest tiles of which there are enough, given how many of kMaxTileRows there would be.
constexpr int TileRowsFor(int64_t num_largest_tiles) {
  int rows = kMaxTileRows;
  for (; rows > kMinTileRows && num_largest_tiles < kEnoughTiles; rows /= 2) num_largest_tiles *= 2;
  return rows;
}

// Rows of x that a tile has.
struct RowTile {
  int expert = 0;
  int32_t first = 0;     // as x counts
  int32_t num_rows = 0;  // 0: there is nothing to do
};

// Where experts begin is known to the device alone, so tiles are dealt out by slots of which some
// stay empty: those of expert e begin at begin[e] / tile_rows + e, which leaves it as many as it
// needs, and lets a block find its expert without looking at all of them.
constexpr int64_t NumTileSlots(int64_t num_rows, int num_experts, int tile_rows) {
  return num_rows / tile_rows + num_experts;
}

constexpr RowTile TileOfSlot(int32_t slot, const int32_t* begin, int num_experts, int tile_rows) {
  int expert = 0;
  for (int behind = num_experts; behind - expert > 1;) {
    const int middle = (expert + behind) / 2;
    (begin[middle] / tile_rows + middle <= slot ? expert : behind) = middle;
  }
  const int32_t tile = slot - (begin[expert] / tile_rows + expert);
  const int32_t first = begin[expert] + tile * tile_rows;
  const int32_t left = begin[expert + 1] - first;
  return {expert, first, left < 0 ? 0 : left < tile_rows ? left : tile_rows};
}

namespace cuda {

// ternary_tiles.cu: tiles of at most `tile_rows` rows, one of kMinTileRows .. kMaxTileRows.
void TernaryTiles(const QuantizedRows& x, const TernaryGroups& groups, int tile_rows,
                  Executor& executor);
void ExpertTiles(const ExpertMatmulArgs& args, int tile_rows, Executor& executor);

}  // namespace cuda
}  // namespace ternion::kernels
