// Grouping of (token, slot) pairs by expert, and cutting of an expert's tokens into blocks.
#include "moe/routing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/token_blocks.h"

namespace cpumoe {
namespace {

TEST(TokenBlocksTest, CoversAllTokensEvenly) {
  for (int most = 1; most <= 16; ++most) {
    for (int64_t tokens = 0; tokens <= 100; ++tokens) {
      const TokenBlocks blocks(tokens, most);
      EXPECT_EQ(blocks.count(), CeilDiv(tokens, most));
      int64_t covered = 0;
      for (int64_t b = 0; b < blocks.count(); ++b) {
        EXPECT_EQ(blocks.Begin(b), covered);
        EXPECT_LE(blocks.Size(b), most);
        EXPECT_LE(blocks.Size(0) - blocks.Size(b), 1);
        if (blocks.count() > 1) {
          EXPECT_GE(blocks.Size(b), TokenBlocks::FewestOfSeveral(most));
        }
        covered += blocks.Size(b);
      }
      EXPECT_EQ(covered, tokens);
    }
  }
}

using Pair = std::tuple<int64_t, int32_t, float>;  // expert, token, weight

std::vector<Pair> PairsOf(const Routing& routing) {
  std::vector<Pair> pairs;
  for (const Routing::Expert& expert : routing.experts()) {
    for (int64_t i = expert.begin; i < expert.begin + expert.count; ++i) {
      pairs.emplace_back(expert.id, routing.tokens()[i], routing.weights()[i]);
    }
  }
  return pairs;
}

// The ids of four tokens with three slots each, for four experts. -1 and 4 belong to no expert
// here.
constexpr int32_t kIds[] = {2, 0, 2, -1, 4, 1, 3, 3, 0, 1, -1, 2};
constexpr float kWeights[] = {0.f, 1.f, 2.f, 3.f, 4.f, 5.f, 6.f, 7.f, 8.f, 9.f, 10.f, 11.f};

TEST(RoutingTest, OrdersByExpertTokenAndSlot) {
  Routing routing;
  routing.Build({.ids = kIds, .weights = kWeights, .top_k = 3}, 0, 4, {1, 1, 1, 1});
  const std::vector<Pair> expected = {{0, 0, 1.f},  {0, 2, 8.f}, {1, 1, 5.f},
                                      {1, 3, 9.f},  {2, 0, 0.f}, {2, 0, 2.f},
                                      {2, 3, 11.f}, {3, 2, 6.f}, {3, 2, 7.f}};
  EXPECT_EQ(PairsOf(routing), expected);
}

TEST(RoutingTest, TakesIdsOf64Bits) {
  const std::vector<int64_t> ids(std::begin(kIds), std::end(kIds));
  Routing narrow, wide;
  narrow.Build({.ids = kIds, .weights = kWeights, .top_k = 3}, 0, 4, {1, 1, 1, 1});
  wide.Build({.ids = ids.data(), .ids_are_64_bit = true, .weights = kWeights, .top_k = 3}, 0, 4,
             {1, 1, 1, 1});
  EXPECT_EQ(PairsOf(wide), PairsOf(narrow));
}

TEST(RoutingTest, SkipsMaskedExperts) {
  const uint8_t mask[] = {1, 0, 255, 0};
  Routing routing;
  routing.Build({.ids = kIds, .weights = kWeights, .mask = mask, .top_k = 3}, 0, 4, {1, 1, 1, 1});
  const std::vector<Pair> expected = {{1, 1, 5.f}, {1, 3, 9.f}, {3, 2, 6.f}, {3, 2, 7.f}};
  EXPECT_EQ(PairsOf(routing), expected);
}

TEST(RoutingTest, TakesPartOfTheTokens) {
  Routing routing;
  routing.Build({.ids = kIds, .weights = kWeights, .top_k = 3}, 2, 3, {1, 1, 1, 1});
  const std::vector<Pair> expected = {{0, 0, 8.f}, {3, 0, 6.f}, {3, 0, 7.f}};
  EXPECT_EQ(PairsOf(routing), expected);
}

TEST(RoutingTest, NoTokens) {
  Routing routing;
  routing.Build({.top_k = 3}, 0, 0, {1, 1});
  EXPECT_TRUE(routing.experts().empty());
}

TEST(RoutingTest, RefusesIdsOutOfRangeWithTheirPlace) {
  for (const int64_t bad : {int64_t{-2}, int64_t{5}, int64_t{1} << 32}) {
    std::vector<int64_t> ids(std::begin(kIds), std::end(kIds));
    ids[7] = bad;
    const uint8_t mask[] = {1, 1, 1, 1};
    Routing routing;
    try {
      routing.Build({.ids = ids.data(),
                     .ids_are_64_bit = true,
                     .weights = kWeights,
                     .mask = mask,
                     .top_k = 3},
                    0, 4, {1, 1, 1, 1});
      ADD_FAILURE() << bad << " was accepted";
    } catch (const std::out_of_range& error) {
      EXPECT_EQ(error.what(),
                "topk_ids[2, 1]: expert ids must be in [0, 4), or -1 or 4 for an expert to skip; "
                "got " +
                    std::to_string(bad));
    }
  }
}

// Ids 0 and 2 are replicas, whose pairs become one group.
TEST(RoutingTest, ReplicasJoinOneGroup) {
  constexpr int32_t kCopyOf[] = {1, 0, 1, 2};
  Routing routing;
  routing.Build({.ids = kIds, .weights = kWeights, .top_k = 3}, 0, 4, {1, 1, 1}, kCopyOf);
  const std::vector<Pair> expected = {{0, 1, 5.f},  {0, 3, 9.f}, {1, 0, 0.f},
                                      {1, 0, 1.f},  {1, 0, 2.f}, {1, 2, 8.f},
                                      {1, 3, 11.f}, {2, 2, 6.f}, {2, 2, 7.f}};
  EXPECT_EQ(PairsOf(routing), expected);
  std::vector<std::atomic<int64_t>> tokens(4);
  for (int i = 0; i < 2; ++i) routing.CountTokens(tokens);
  EXPECT_EQ(std::vector<int64_t>(tokens.begin(), tokens.end()), (std::vector<int64_t>{4, 4, 6, 4}));
}

TEST(RoutingTest, AReplicaIsMaskedAloneAndNamedInErrors) {
  constexpr int32_t kCopyOf[] = {1, 0, 1, 2};
  const uint8_t mask[] = {1, 0, 0, 0};
  const RoutingInput input = {.ids = kIds, .weights = kWeights, .mask = mask, .top_k = 3};
  Routing routing;
  routing.Build(input, 0, 4, {1, 1, 1}, kCopyOf);
  const std::vector<Pair> expected = {{0, 1, 5.f},  {0, 3, 9.f}, {1, 0, 0.f}, {1, 0, 2.f},
                                      {1, 3, 11.f}, {2, 2, 6.f}, {2, 2, 7.f}};
  EXPECT_EQ(PairsOf(routing), expected);
  try {
    routing.Build(input, 0, 4, {1, 0, 1}, kCopyOf);
    ADD_FAILURE() << "a copy without weights was accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "expert 2 has no weights, but a token is routed to it; pack it first");
  }
}

TEST(RoutingTest, RefusesExpertsWithoutWeightsUnlessMasked) {
  Routing routing;
  EXPECT_THROW(routing.Build({.ids = kIds, .weights = kWeights, .top_k = 3}, 0, 4, {1, 1, 0, 1}),
               std::invalid_argument);
  const uint8_t mask[] = {0, 0, 1, 0};
  routing.Build({.ids = kIds, .weights = kWeights, .mask = mask, .top_k = 3}, 0, 4, {1, 1, 0, 1});
  EXPECT_EQ(routing.experts().size(), 3u);
}

}  // namespace
}  // namespace cpumoe
