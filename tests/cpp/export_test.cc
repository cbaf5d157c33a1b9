// Unpack returns the checkpoint's bytes, for every ISA x format.
#include <gtest/gtest.h>

#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/moe_test_util.h"
#include "moe/pack_experts.h"
#include "threading/pinned_pool.h"

namespace cpumoe {
namespace {

// Memory for the matrices of one expert, to export to.
struct Copy {
  TestMatrix gate, up, down;

  Copy(const std::string& format, int64_t intermediate, int64_t hidden)
      : gate(format, intermediate, hidden),
        up(format, intermediate, hidden),
        down(format, hidden, intermediate) {}
  ExpertDestination Views(int64_t begin = 0) {
    return {.gate = gate.MutableView(),
            .up = up.MutableView(),
            .down = down.MutableView(),
            .intermediate_begin = begin};
  }
};

// Does all tasks of one destination.
void UnpackAll(const Moe& moe, int64_t expert, const ExpertDestination& out, ThreadPool& pool) {
  moe.Unpack(expert, {&out, 1}, 0, moe.UnpackTasks({&out, 1}), pool);
}

class ExportTest : public MoeTest {
 protected:
  // Columns that a shard must be whole multiples of.
  int64_t GroupSize() const {
    return VisitFormat(format(), []<class F>(F) { return ColumnUnit<F>(); });
  }
  // Scales have any magnitude, because every byte of the checkpoint must come back, whatever it
  // means.
  TestLayer MakeLayer(int64_t intermediate) const {
    return {
        format(),
        LayerSpec{
            .experts = 3, .intermediate = intermediate, .gate_up_scales = {}, .down_scales = {}}};
  }
};
CPUMOE_FOR_EACH_ISA_AND_FORMAT(ExportTest);

// If threads outnumber the experts, they share each expert. Otherwise each thread takes whole
// experts.
TEST_P(ExportTest, EveryExpertBitForBit) {
  const TestLayer layer = MakeLayer(5 * GroupSize());
  const MoeConfig& config = layer.config();
  const std::vector<int64_t> experts = {2, 0, 1};
  const std::vector<ExpertSource> sources = {layer.Source(2), layer.Source(0), layer.Source(1)};
  for (const int threads : {1, 2, 5}) {
    PinnedPool pool({.threads = threads});
    const auto moe = Create(config);
    PackExperts(*moe, experts, sources, pool);
    for (int64_t e = 0; e < config.num_experts; ++e) {
      Copy copy(format(), config.intermediate_size, config.hidden_size);
      UnpackAll(*moe, e, copy.Views(), pool);
      EXPECT_EQ(copy.gate, layer.Matrix(e, 0)) << "expert " << e;
      EXPECT_EQ(copy.up, layer.Matrix(e, 1)) << "expert " << e;
      EXPECT_EQ(copy.down, layer.Matrix(e, 2)) << "expert " << e;
    }
  }
}

TEST_P(ExportTest, EveryExpertOfDividedRowsBitForBit) {
  const TestLayer layer = MakeLayer(5 * GroupSize());
  MoeConfig config = layer.config();
  const std::vector<NodeThreads> nodes = MadeUpNodes({1, 2, 1});
  for (const NodeThreads& node : nodes) config.nodes.push_back(node.memory);
  const auto moe = Create(config);
  PinnedPool pool({.nodes = nodes});
  const std::vector<ExpertSource> sources = {layer.Source(0), layer.Source(1), layer.Source(2)};
  PackExperts(*moe, std::vector<int64_t>{0, 1, 2}, sources, pool);
  moe->Evict(1);  // the others keep all their bytes
  for (const int64_t e : {0, 2}) {
    Copy copy(format(), config.intermediate_size, config.hidden_size);
    UnpackAll(*moe, e, copy.Views(), pool);
    EXPECT_EQ(copy.gate, layer.Matrix(e, 0)) << "expert " << e;
    EXPECT_EQ(copy.up, layer.Matrix(e, 1)) << "expert " << e;
    EXPECT_EQ(copy.down, layer.Matrix(e, 2)) << "expert " << e;
  }
}

// Without a gate, an expert takes no memory for one, and its export leaves the gate's alone.
TEST_P(ExportTest, ExpertsWithoutAGate) {
  const int64_t intermediate = 5 * GroupSize();
  const TestLayer layer(format(), LayerSpec{.experts = 3,
                                            .intermediate = intermediate,
                                            .glu = kUngatedRelu2,
                                            .gate_up_scales = {},
                                            .down_scales = {}});
  const auto moe = Create(layer), gated = Create(MakeLayer(intermediate));
  EXPECT_LT(moe->copy_bytes(), gated->copy_bytes() * 7 / 10);
  SerialPool pool;
  for (int64_t e = 0; e < 3; ++e) {
    Copy copy(format(), intermediate, layer.config().hidden_size);
    const Copy untouched = copy;
    UnpackAll(*moe, e, copy.Views(), pool);
    EXPECT_EQ(copy.gate, untouched.gate);
    EXPECT_EQ(copy.up, layer.Matrix(e, 1));
    EXPECT_EQ(copy.down, layer.Matrix(e, 2));
  }
}

// The shares of a tensor-parallel split, exported one by one, make up the whole expert.
TEST_P(ExportTest, SlicesOfIntermediateFeatures) {
  const int64_t last = GroupSize() - 6;  // the last shard ends within a group
  const TestLayer layer = MakeLayer(3 * GroupSize() + last);
  const MoeConfig& config = layer.config();
  const auto moe = Create(layer);
  SerialPool pool;
  Copy whole(format(), config.intermediate_size, config.hidden_size);
  const ExpertDestination out = whole.Views();
  const int64_t shares[][2] = {
      {0, GroupSize()}, {GroupSize(), 2 * GroupSize()}, {3 * GroupSize(), last}};
  VisitFormat(format(), [&]<class F>(F) {
    for (const auto& [begin, count] : shares) {
      UnpackAll(*moe, 1,
                {.gate = out.gate.Rows(begin, count),
                 .up = out.up.Rows(begin, count),
                 .down = out.down.template Columns<F>(begin, count),
                 .intermediate_begin = begin},
                pool);
    }
  });
  EXPECT_EQ(whole.gate, layer.Matrix(1, 0));
  EXPECT_EQ(whole.up, layer.Matrix(1, 1));
  EXPECT_EQ(whole.down, layer.Matrix(1, 2));
}

// One call writes several shards, and any part of its tasks. Threads share them.
TEST_P(ExportTest, ShardsInOneCallAndTaskByTask) {
  const TestLayer layer = MakeLayer(6 * GroupSize());
  const MoeConfig& config = layer.config();
  const auto moe = Create(layer);
  PinnedPool pool({.threads = 3});
  Copy whole(format(), config.intermediate_size, config.hidden_size);
  const ExpertDestination out = whole.Views();
  std::vector<ExpertDestination> shards;
  VisitFormat(format(), [&]<class F>(F) {
    for (const int64_t begin : {2 * GroupSize(), 4 * GroupSize(), int64_t{0}}) {
      const int64_t count = 2 * GroupSize();
      shards.push_back({.gate = out.gate.Rows(begin, count),
                        .up = out.up.Rows(begin, count),
                        .down = out.down.template Columns<F>(begin, count),
                        .intermediate_begin = begin});
    }
  });
  const int64_t tasks = moe->UnpackTasks(shards);
  EXPECT_GE(tasks, 2 * std::ssize(shards));
  const auto expect_whole = [&] {
    EXPECT_EQ(whole.gate, layer.Matrix(2, 0));
    EXPECT_EQ(whole.up, layer.Matrix(2, 1));
    EXPECT_EQ(whole.down, layer.Matrix(2, 2));
  };
  moe->Unpack(2, shards, 0, tasks, pool);
  expect_whole();
  UnpackAll(*moe, 0, out, pool);
  for (int64_t task = 0; task < tasks; ++task) moe->Unpack(2, shards, task, task + 1, pool);
  expect_whole();
  EXPECT_EQ(moe->UnpackTasks({}), 0);
}

// Rows as long as a model's, whose tiles fill several lines of each row.
TEST_P(ExportTest, ScalesAsBf16AndLongRows) {
  if (VisitFormat(format(), []<class F>(F) {
        return !HasScales<F> || !HoldsScales(TypeOfScale<typename F::Scale>(), ScaleType::kBf16);
      })) {
    GTEST_SKIP() << "there are no scales that bf16 holds";
  }
  const TestLayer layer(format(), LayerSpec{.experts = 1,
                                            .hidden = 33 * GroupSize(),
                                            .intermediate = 18 * GroupSize(),
                                            .gate_up_scales = {},
                                            .down_scales = {}});
  const MoeConfig& config = layer.config();
  const auto moe = Create(layer);
  SerialPool pool;
  Copy copy(format(), config.intermediate_size, config.hidden_size);
  ExpertDestination out = copy.Views();
  std::vector<std::vector<uint16_t>> numbers;
  for (MutableRawMatrix* matrix : {&out.gate, &out.up, &out.down}) {
    const int64_t groups = matrix->columns / GroupSize();
    numbers.emplace_back(matrix->rows * groups);
    matrix->scales = reinterpret_cast<std::byte*>(numbers.back().data());
    matrix->scales_stride = groups * 2;
    matrix->grid.type = ScaleType::kBf16;
  }
  UnpackAll(*moe, 0, out, pool);
  VisitFormat(format(), [&]<class F>(F) {
    for (int m = 0; m < 3; ++m) {
      const RawMatrix source = layer.Matrix(0, m).View();
      const int64_t groups = source.columns / GroupSize();
      for (int64_t i = 0; i < source.rows * groups; ++i) {
        const auto scale = LoadScale<typename F::Scale>(
            source.scales + i / groups * source.scales_stride +
            i % groups * static_cast<int64_t>(sizeof(typename F::Scale)));
        ASSERT_EQ(Bf16{numbers[m][i]}.ToFloat(), scale.ToFloat()) << m << ": " << i;
      }
    }
  });
  Copy stored(format(), config.intermediate_size, config.hidden_size);
  UnpackAll(*moe, 0, stored.Views(), pool);
  EXPECT_EQ(stored.gate, layer.Matrix(0, 0));
  EXPECT_EQ(stored.up, layer.Matrix(0, 1));
  EXPECT_EQ(stored.down, layer.Matrix(0, 2));
}

TEST_P(ExportTest, RefusesWhatItCannotExport) {
  const TestLayer layer = MakeLayer(2 * GroupSize());
  const int64_t hidden = layer.config().hidden_size, intermediate = 2 * GroupSize();
  const auto moe = Create(layer);
  SerialPool pool;
  Copy copy(format(), intermediate, hidden);
  EXPECT_THROW(UnpackAll(*moe, -1, copy.Views(), pool), std::out_of_range);
  EXPECT_THROW(UnpackAll(*moe, 3, copy.Views(), pool), std::out_of_range);
  EXPECT_THROW(UnpackAll(*moe, 0, copy.Views(-GroupSize()), pool), std::invalid_argument);
  EXPECT_THROW(UnpackAll(*moe, 0, copy.Views(GroupSize()), pool), std::invalid_argument);
  Copy part(format(), GroupSize(), hidden);
  EXPECT_THROW(UnpackAll(*moe, 0, part.Views(4), pool), std::invalid_argument);
  const auto empty = Create(layer.config());
  EXPECT_THROW(UnpackAll(*empty, 0, copy.Views(), pool), std::invalid_argument);

  // Every matrix must have the shape of the slice.
  Copy wide(format(), intermediate, hidden + GroupSize());
  const auto refuses = [&](auto&& change) {
    ExpertDestination out = copy.Views();
    change(out);
    EXPECT_THROW(UnpackAll(*moe, 0, out, pool), std::invalid_argument);
  };
  refuses([&](ExpertDestination& out) { out.gate = wide.gate.MutableView(); });
  refuses([&](ExpertDestination& out) { out.up = wide.up.MutableView(); });
  refuses([&](ExpertDestination& out) { out.down = wide.down.MutableView(); });
  refuses([&](ExpertDestination& out) { out.up.rows = GroupSize(); });
  refuses([&](ExpertDestination& out) { out.down.columns = GroupSize(); });
}

}  // namespace
}  // namespace cpumoe
