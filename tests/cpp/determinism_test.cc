// Results are bit-identical for any number of threads, in any run, in any workspace, and beside any
// other tokens.
#include <gtest/gtest.h>

#include <cfenv>
#include <memory>
#include <vector>

#include "cpp/moe_test_util.h"
#include "threading/pinned_pool.h"

namespace cpumoe {
namespace {

// The threads of each node.
const std::vector<std::vector<int>> kNodes = {{2}, {1, 1}, {3, 1, 1}, {1, 2, 9, 1}};

class DeterminismTest : public MoeTest {};
CPUMOE_FOR_EACH_ISA_FORMAT_AND_PATH(DeterminismTest);

TEST_P(DeterminismTest, AnyNumberOfThreadsAndRuns) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32, .has_bias = true});
  const auto moe = Create(layer);
  for (const int64_t tokens : {1, 3, 29}) {
    const Batch batch(layer.config(), BatchSpec{.tokens = tokens, .top_k = 3});
    const std::vector<std::byte> expected = Forward(*moe, batch);
    for (const int threads : {1, 2, 5}) {
      PinnedPool pool({.threads = threads});
      Workspace workspace;  // reused: leftovers of an earlier run must not matter
      for (int run = 0; run < 2; ++run) {
        EXPECT_EQ(Forward(*moe, batch, pool, workspace), expected)
            << tokens << " tokens, " << threads << " threads, run " << run;
      }
    }
  }
}

// The more threads, the fewer tiles a task takes.
TEST_P(DeterminismTest, AnyNumberOfTilesPerTask) {
  const TestLayer layer(format(), LayerSpec{.experts = 2, .hidden = 544, .intermediate = 288});
  const auto moe = Create(layer);
  const Batch batch(layer.config(), BatchSpec{.tokens = run_.MultipliesBySignals() ? 6 : 14});
  const std::vector<std::byte> expected = Forward(*moe, batch);
  for (const int threads : {2, 3, 17}) {
    PinnedPool pool({.threads = threads});
    Workspace workspace;
    EXPECT_EQ(Forward(*moe, batch, pool, workspace), expected) << threads << " threads";
  }
}

TEST_P(DeterminismTest, PackingOnAnyNumberOfThreads) {
  const TestLayer layer(format(), LayerSpec{});
  const Batch batch(layer.config(), BatchSpec{});
  const std::vector<std::byte> expected = Forward(*Create(layer), batch);
  for (const int threads : {2, 5}) {
    PinnedPool pool({.threads = threads});
    const auto moe = Create(layer.config());
    for (int64_t e = 0; e < layer.config().num_experts; ++e) moe->Pack(e, layer.Source(e), pool);
    EXPECT_EQ(Forward(*moe, batch), expected) << threads << " threads";
  }
}

// Rows are divided among nodes, which are made up here. Their memory is then that of the machine.
// Sizes are no multiples of what nodes get, and a node gets no rows at all.
TEST_P(DeterminismTest, AnyNumberOfNodes) {
  LayerSpec spec{.experts = 3, .hidden = 176, .intermediate = 144, .has_bias = true};
  for (const std::vector<int>& threads : kNodes) {
    if (run_.MultipliesBySignals() && threads.size() != 2) continue;
    for (const Glu& glu : {kPlain, kUngatedRelu2}) {
      if (!glu.gated && threads.size() != 2) continue;
      spec.glu = glu;
      const TestLayer layer(format(), spec);
      const auto whole = Create(layer);
      const std::vector<NodeThreads> nodes = MadeUpNodes(threads);
      MoeConfig config = layer.config();
      for (const NodeThreads& node : nodes) config.nodes.push_back(node.memory);
      const auto divided = Create(config);
      PinnedPool pool({.nodes = nodes}), other({.threads = 2});
      for (int64_t e = 0; e < spec.experts; ++e) divided->Pack(e, layer.Source(e), pool);
      EXPECT_EQ(divided->copy_bytes(), whole->copy_bytes());
      EXPECT_EQ(divided->memory().size(), nodes.size());
      Workspace workspace;
      for (const int64_t tokens : {1, 4, 29}) {
        if (run_.MultipliesBySignals() && tokens > 4) continue;
        const Batch batch(config, BatchSpec{.tokens = tokens});
        const std::vector<std::byte> expected = Forward(*whole, batch);
        EXPECT_EQ(Forward(*divided, batch, pool, workspace), expected)
            << tokens << " tokens, " << threads.size() << " nodes";
        EXPECT_EQ(Forward(*divided, batch, other, workspace), expected) << "on another pool";
        EXPECT_EQ(Forward(*whole, batch, pool, workspace), expected) << "of another layer";
      }
      divided->Evict(1);
      EXPECT_FALSE(divided->HasWeights(1));
    }
  }
}

// Replicas give what calls of the one expert give.
TEST_P(DeterminismTest, ReplicasOfAnExpert) {
  const TestLayer layer(format(), LayerSpec{.experts = 3, .has_bias = true});
  MoeConfig config = layer.config();
  config.num_experts = 5;
  config.copy_of = {2, 0, 1, 2, 0};
  const auto replicated = Create(config);
  SerialPool pool;
  for (const int64_t expert : {0, 1, 2}) {
    replicated->Pack(expert, layer.Source(config.copy_of[expert]), pool);
  }
  for (const int64_t expert : {3, 4}) EXPECT_TRUE(replicated->HasWeights(expert));
  for (const int64_t tokens : {1, 4, 30}) {
    Batch batch(config, BatchSpec{.tokens = tokens, .top_k = 4});
    const std::vector<std::byte> actual = Forward(*replicated, batch);
    for (int64_t& id : batch.ids) id = config.CopyOf(id);
    EXPECT_EQ(actual, Forward(*Create(layer), batch)) << tokens << " tokens";
  }
  replicated->Evict(3);
  EXPECT_FALSE(replicated->HasWeights(0));
}

// The arithmetic needs rounding to nearest, in whatever mode the caller's thread is.
TEST_P(DeterminismTest, TheCallersRoundingMode) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer);
  PinnedPool pool({.threads = 2});
  Workspace workspace;
  for (const int64_t tokens : {1, 3}) {
    const Batch batch(layer.config(), BatchSpec{.tokens = tokens});
    const std::vector<std::byte> expected = Forward(*moe, batch, pool, workspace);
    const int mode = std::fegetround();
    std::fesetround(FE_UPWARD);
    const std::vector<std::byte> result = Forward(*moe, batch, pool, workspace);
    std::fesetround(mode);
    EXPECT_EQ(result, expected) << tokens << " tokens";
  }
}

// One workspace serves layers of several sizes and calls of several lengths.
TEST_P(DeterminismTest, ASharedWorkspace) {
  const TestLayer small(format(), LayerSpec{.hidden = 32, .intermediate = 32});
  const TestLayer large(format(), LayerSpec{.hidden = 96, .intermediate = 64});
  const auto small_moe = Create(small), large_moe = Create(large);
  SerialPool pool;
  Workspace workspace;
  for (const int64_t tokens : {1, 20, 2, 1}) {
    const Batch small_batch(small.config(), BatchSpec{.tokens = tokens});
    const Batch large_batch(large.config(), BatchSpec{.tokens = tokens});
    EXPECT_EQ(Forward(*small_moe, small_batch, pool, workspace), Forward(*small_moe, small_batch));
    EXPECT_EQ(Forward(*large_moe, large_batch, pool, workspace), Forward(*large_moe, large_batch));
  }
}

// fp32 calls that are not rounded to bf16 take one kernel for any number of tokens.
TEST_P(DeterminismTest, ATokenOfAnFp32CallIsTheSameInAnyBatchWhereTheIsaHasBf16) {
  if (GetParam().fp32_as_bf16) GTEST_SKIP() << "the number of tokens chooses the kernels";
  const TestLayer layer(format(), LayerSpec{.has_bias = true, .few_token_limit = 0});
  const auto moe = Create(layer);
  const int64_t hidden = layer.config().hidden_size;
  const Batch batch(layer.config(), BatchSpec{.tokens = 70});
  const std::vector<double> together = Numbers(DType::kFp32, Forward(*moe, batch));
  for (int64_t t = 0; t < batch.spec().tokens; t += 7) {
    const auto row = together.begin() + t * hidden;
    EXPECT_EQ(Numbers(DType::kFp32, Forward(*moe, batch.Only(t))),
              std::vector<double>(row, row + hidden))
        << "token " << t;
  }
}

TEST_P(DeterminismTest, BatchInvariant) {
  const TestLayer layer(format(), LayerSpec{.has_bias = true, .batch_invariant = true});
  const auto moe = Create(layer);
  const int64_t hidden = layer.config().hidden_size;
  for (const int64_t tokens : {2, 13, 27}) {
    const Batch batch(layer.config(), BatchSpec{.tokens = tokens});
    const std::vector<double> together = Numbers(DType::kFp32, Forward(*moe, batch));
    for (int64_t t = 0; t < tokens; t += 3) {
      const std::vector<double> alone = Numbers(DType::kFp32, Forward(*moe, batch.Only(t)));
      const auto row = together.begin() + t * hidden;
      EXPECT_EQ(alone, std::vector<double>(row, row + hidden)) << "token " << t << " of " << tokens;
    }
  }
}

}  // namespace
}  // namespace cpumoe
