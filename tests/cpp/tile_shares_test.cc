#include "packing/tile_shares.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace cpumoe {
namespace {

std::vector<MemoryNode> Nodes(const std::vector<int>& threads) {
  std::vector<MemoryNode> nodes;
  for (const int count : threads) nodes.push_back({static_cast<int>(nodes.size()), count});
  return nodes;
}

std::vector<int64_t> Tiles(int64_t tiles, const std::vector<int>& threads) {
  const TileShares shares(tiles, Nodes(threads));
  std::vector<int64_t> counts;
  for (int n = 0; n < shares.count(); ++n) counts.push_back(shares.tiles(n));
  return counts;
}

using Counts = std::vector<int64_t>;

TEST(TileShares, AreInProportionToThreads) {
  EXPECT_EQ(Tiles(128, {}), Counts({128}));
  EXPECT_EQ(Tiles(128, {7}), Counts({128}));
  EXPECT_EQ(Tiles(128, {1, 1}), Counts({64, 64}));
  EXPECT_EQ(Tiles(128, {3, 1}), Counts({96, 32}));
  EXPECT_EQ(Tiles(100, {1, 1, 1}), Counts({34, 32, 34}));
  EXPECT_EQ(Tiles(256, {24, 24, 24, 24, 24, 24, 24, 24}), Counts(8, 32));
}

TEST(TileShares, OddMatricesAndNodesWithoutTiles) {
  EXPECT_EQ(Tiles(1, {1, 1}), Counts({1, 0}));
  EXPECT_EQ(Tiles(3, {1, 1}), Counts({2, 1}));
  EXPECT_EQ(Tiles(9, {1, 1, 1, 1}), Counts({2, 4, 2, 1}));
  EXPECT_EQ(Tiles(4, {1, 1, 1, 1, 1}), Counts({0, 2, 0, 2, 0}));
  EXPECT_EQ(Tiles(2, {1, 100}), Counts({0, 2}));
}

TEST(TileShares, CoverEveryTileOnce) {
  for (const int64_t tiles : {1, 2, 5, 31, 128}) {
    for (const std::vector<int>& threads :
         {std::vector<int>{1}, {1, 1}, {5, 1, 3}, {1, 1, 1, 1, 1, 1, 1, 1}}) {
      const TileShares shares(tiles, Nodes(threads));
      int64_t next = 0;
      for (int n = 0; n < shares.count(); ++n) {
        EXPECT_EQ(shares.begin(n), next);
        EXPECT_TRUE(n == 0 || next == tiles || next % 2 == 0) << "a node begins with a pair";
        for (int64_t tile = shares.begin(n); tile < shares.end(n); ++tile) {
          EXPECT_EQ(shares.Of(tile), n);
        }
        next = shares.end(n);
      }
      EXPECT_EQ(next, tiles);
    }
  }
}

}  // namespace
}  // namespace cpumoe
