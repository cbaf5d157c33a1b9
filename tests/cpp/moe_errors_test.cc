// What operators refuse, and the messages that they give.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/message_of.h"
#include "cpp/moe_test_util.h"
#include "moe/pack_experts.h"
#include "threading/pinned_pool.h"

namespace cpumoe {
namespace {

class MoeErrorsTest : public MoeTest {
 protected:
  static inline const MoeConfig kConfig = {
      .num_experts = 4, .hidden_size = 64, .intermediate_size = 96, .glu = {}};

  bool has_scales() const {
    return VisitFormat(format(), []<class F>(F) { return HasScales<F>; });
  }
  // The name by which hosts know the format.
  std::string name() const {
    return VisitFormat(format(), []<class F>(F) { return std::string(F::kName); });
  }
  std::string CreateMessage(const MoeConfig& config) const {
    return MessageOf<std::invalid_argument>([&] { Create(config); });
  }
  static std::string PackMessage(Moe& moe, const ExpertSource& source) {
    SerialPool pool;
    return MessageOf<std::invalid_argument>([&] { moe.Pack(0, source, pool); });
  }
};
CPUMOE_FOR_EACH_ISA_AND_FORMAT(MoeErrorsTest);

TEST_P(MoeErrorsTest, Sizes) {
  MoeConfig config = kConfig;
  if (VisitFormat(format(), []<class F>(F) { return F::kCodeBits < 8; })) {
    config.hidden_size = 2889;
    EXPECT_EQ(
        CreateMessage(config),
        name() + ": hidden_size must be a multiple of 2, because a byte has 2 codes, got 2889");
  }
  config = kConfig;
  config.intermediate_size = 0;
  EXPECT_EQ(CreateMessage(config), "intermediate_size must be positive, got 0");
  config = kConfig;
  config.num_experts = 0;
  EXPECT_EQ(CreateMessage(config), "num_experts must be positive, got 0");
}

TEST_P(MoeErrorsTest, ExpertIndex) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer.config());
  SerialPool pool;
  for (const int64_t expert : {-1, 4}) {
    EXPECT_EQ(MessageOf<std::out_of_range>([&] { moe->Pack(expert, layer.Source(0), pool); }),
              "expert " + std::to_string(expert) + " is not one of the layer's 4");
  }
}

TEST_P(MoeErrorsTest, Shapes) {
  const TestLayer layer(format(), LayerSpec{}), other(format(), LayerSpec{.intermediate = 64});
  const auto moe = Create(layer.config());
  for (int which = 0; which < 3; ++which) {
    ExpertSource source = layer.Source(0);
    RawMatrix& matrix = which == 0 ? source.gate : which == 1 ? source.up : source.down;
    matrix = other.Matrix(0, which).View();
    EXPECT_EQ(PackMessage(*moe, source),
              which < 2 ? "test.weight: expected [96, 64] weights, got [64, 64]"
                        : "test.weight: expected [64, 96] weights, got [64, 64]");
  }
}

TEST_P(MoeErrorsTest, Biases) {
  const TestLayer with(format(), LayerSpec{.has_bias = true}), without(format(), LayerSpec{});
  EXPECT_EQ(PackMessage(*Create(with.config()), without.Source(0)),
            "expert 0: three biases expected, as the layer's has_bias says");
  EXPECT_EQ(PackMessage(*Create(without.config()), with.Source(0)),
            "expert 0: no biases expected, as the layer's has_bias says");
  ExpertSource source = with.Source(0);
  source.down_bias = nullptr;
  EXPECT_EQ(PackMessage(*Create(with.config()), source),
            "expert 0: three biases expected, as the layer's has_bias says");
}

TEST_P(MoeErrorsTest, AGateThatExpertsDoNotHave) {
  const LayerSpec spec = {.glu = kUngatedRelu2, .has_bias = true};
  const TestLayer layer(format(), spec), gated(format(), LayerSpec{.has_bias = true});
  const auto moe = Create(layer.config());
  EXPECT_EQ(PackMessage(*moe, layer.Source(0)), "no exception");
  ExpertSource source = layer.Source(0);
  source.gate = gated.Source(0).gate;
  EXPECT_EQ(PackMessage(*moe, source),
            "test.weight: expected none, because the layer's experts have no gate projection");
  source = layer.Source(0);
  source.gate_bias = source.up_bias;
  EXPECT_EQ(PackMessage(*moe, source),
            "expert 0: biases of up and down expected, as the layer's has_bias says");
  source = gated.Source(0);
  source.gate = {.name = "test.weight"};
  EXPECT_EQ(PackMessage(*Create(gated.config()), source),
            "test.weight: expected [96, 64] weights, got [0, 0]");
}

TEST_P(MoeErrorsTest, Factors) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer);
  const bool has_factors = VisitFormat(format(), []<class F>(F) { return kHasFactorOf<F>; });
  const ExpertSource source = layer.Source(0);
  const RawMatrix* const matrices[] = {&source.gate, &source.up, &source.down};
  for (int m = 0; m < 3; ++m) EXPECT_EQ(moe->Scales(0)[m].factor, matrices[m]->factor);
  for (const float factor : {2.0f, std::numeric_limits<float>::infinity(), 1.0f}) {
    ExpertSource changed = source;
    changed.up.factor = factor;
    const bool taken = factor == 1.0f || (has_factors && factor == 2.0f);
    const std::string problem = has_factors ? " needs a finite factor" : " has no factor";
    const std::string got = factor == 2.0f ? ", got 2" : ", got inf";
    EXPECT_EQ(PackMessage(*moe, changed),
              taken ? "no exception" : "test.weight: " + name() + problem + got);
    if (taken) {
      EXPECT_EQ(moe->Scales(0)[1].factor, factor);
    }
  }
}

// A failed Pack leaves the expert without weights, even if it had weights before. The error comes
// out of any thread.
TEST_P(MoeErrorsTest, InvalidScale) {
  if (!has_scales()) GTEST_SKIP() << "there are no scales";
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer);
  TestMatrix damaged = layer.Matrix(1, 2);
  VisitFormat(format(), [&]<class F>(F) {
    const MutableRawMatrix view = damaged.MutableView();
    std::memset(view.scales + 41 * view.scales_stride, 0xff, sizeof(typename F::Scale));
  });
  ExpertSource source = layer.Source(1);
  source.down = damaged.View();
  PinnedPool pool({.threads = 3});
  const std::string message = MessageOf<std::invalid_argument>([&] { moe->Pack(1, source, pool); });
  EXPECT_TRUE(message.starts_with("test.weight: scale [41, 0] is ")) << message;
  Batch batch(layer.config(), BatchSpec{.tokens = 2, .top_k = 4});
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { Forward(*moe, batch); }),
            "expert 1 has no weights, but a token is routed to it; pack it first");
  moe->Pack(1, layer.Source(1), pool);
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { Forward(*moe, batch); }), "no exception");
}

// Scales are missing, or the format has none, or no such groups.
TEST_P(MoeErrorsTest, ScalesOfAnotherForm) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer.config());
  const std::byte some[4] = {};
  ExpertSource source = layer.Source(0);
  source.up.scales = has_scales() ? nullptr : some;
  EXPECT_EQ(PackMessage(*moe, source), has_scales()
                                           ? "test.weight: " + name() + " needs scales, got none"
                                           : "test.weight: " + name() + " has no scales, got some");
  if (!has_scales()) return;
  for (const int64_t depth : {24, 48}) {
    source = layer.Source(0);
    source.down.grid.depth = depth;
    EXPECT_EQ(PackMessage(*moe, source), "test.weight: " + name() + " has no groups of " +
                                             std::to_string(depth) + " weights that share a scale");
  }
}

TEST_P(MoeErrorsTest, ScalesOfAnotherType) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer.config());
  VisitFormat(format(), [&]<class F>(F) {
    if constexpr (HasScales<F>) {
      const std::vector<Fp32> zeros(layer.Source(0).up.rows * kGroupSize);
      for (int32_t i = 0; i < kScaleTypes; ++i) {
        const auto type = static_cast<ScaleType>(i);
        ExpertSource source = layer.Source(0);
        source.up.grid.type = type;
        source.up.scales = reinterpret_cast<const std::byte*>(zeros.data());
        source.up.scales_stride = kGroupSize * sizeof(Fp32);
        const std::string refusal = "test.weight: expected " + ScaleTypeNames(ScaleTypesOf<F>()) +
                                    " scales, for which the layer of " + name() +
                                    " was made, got " + ScaleTypeName(type) + " scales";
        EXPECT_EQ(PackMessage(*moe, source), AllowsScaleType<F>(type) ? "no exception" : refusal);
      }
    } else {
      GTEST_SKIP() << "there are no scales";
    }
  });
}

// If one of several experts is damaged, only the damaged one is sure to be without weights.
TEST_P(MoeErrorsTest, InvalidScaleAmongSeveralExperts) {
  if (!has_scales()) GTEST_SKIP() << "there are no scales";
  const TestLayer layer(format(), LayerSpec{});
  TestMatrix damaged = layer.Matrix(2, 0);
  VisitFormat(format(), [&]<class F>(F) {
    std::memset(damaged.MutableView().scales, 0xff, sizeof(typename F::Scale));
  });
  const std::vector<int64_t> experts = {0, 1, 2, 3};
  std::vector<ExpertSource> sources(4, layer.Source(0));
  sources[2].gate = damaged.View();
  for (const int threads : {1, 3, 8}) {
    PinnedPool pool({.threads = threads});
    const auto moe = Create(layer);
    const auto pack = [&] { PackExperts(*moe, experts, sources, pool); };
    const std::string message = MessageOf<std::invalid_argument>(pack);
    EXPECT_TRUE(message.starts_with("test.weight: scale [0, 0] is ")) << message;
    Batch batch(layer.config(), BatchSpec{.tokens = 1, .top_k = 1});
    batch.ids = {2};
    EXPECT_EQ(MessageOf<std::invalid_argument>([&] { Forward(*moe, batch); }),
              "expert 2 has no weights, but a token is routed to it; pack it first");
  }
}

TEST_P(MoeErrorsTest, MoreExpertsThanTheLayerHas) {
  const TestLayer layer(format(), LayerSpec{});
  const std::vector<int64_t> experts = {3, 4};
  const std::vector<ExpertSource> sources(2, layer.Source(0));
  for (const int threads : {1, 2, 3}) {
    PinnedPool pool({.threads = threads});
    const auto moe = Create(layer.config());
    EXPECT_EQ(MessageOf<std::out_of_range>([&] { PackExperts(*moe, experts, sources, pool); }),
              "expert 4 is not one of the layer's 4");
    const std::vector<int64_t> last = {std::numeric_limits<int64_t>::max()};
    EXPECT_EQ(MessageOf<std::out_of_range>([&] { PackExperts(*moe, last, sources, pool); }),
              "expert 9223372036854775807 is not one of the layer's 4");
  }
}

TEST_P(MoeErrorsTest, UnpackedExperts) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer.config());
  SerialPool pool;
  moe->Pack(0, layer.Source(0), pool);
  Batch batch(layer.config(), BatchSpec{.tokens = 2});
  batch.ids = {0, -1, 0, 3};
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { Forward(*moe, batch); }),
            "expert 3 has no weights, but a token is routed to it; pack it first");
  batch.mask = {0, 0, 0, 1};
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { Forward(*moe, batch); }), "no exception");
}

TEST_P(MoeErrorsTest, IdsOutOfRange) {
  const TestLayer layer(format(), LayerSpec{});
  const auto moe = Create(layer);
  for (const bool wide : {false, true}) {
    for (const int64_t id : {-2, 5}) {
      Batch batch(layer.config(), BatchSpec{.tokens = 4, .top_k = 3, .ids_are_64_bit = wide});
      batch.ids[3 * 3 + 1] = id;
      EXPECT_EQ(MessageOf<std::out_of_range>([&] { Forward(*moe, batch); }),
                "topk_ids[3, 1]: expert ids must be in [0, 4), or -1 or 4 for an expert to skip; "
                "got " +
                    std::to_string(id));
    }
  }
}

TEST_P(MoeErrorsTest, AnEvictedExpertHasNoWeightsUntilItIsPackedAgain) {
  const TestLayer layer(format(), LayerSpec{.has_bias = true});
  const auto moe = Create(layer);
  const Batch batch(layer.config(), BatchSpec{.tokens = 2, .top_k = 4});
  const std::vector<std::byte> expected = Forward(*moe, batch);
  moe->Evict(2);
  moe->Evict(2);
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { Forward(*moe, batch); }),
            "expert 2 has no weights, but a token is routed to it; pack it first");
  SerialPool pool;
  moe->Pack(2, layer.Source(2), pool);
  EXPECT_EQ(Forward(*moe, batch), expected);
  EXPECT_EQ(MessageOf<std::out_of_range>([&] { moe->Evict(4); }),
            "expert 4 is not one of the layer's 4");
}

TEST_P(MoeErrorsTest, BytesAreAboutTheCheckpoints) {
  const TestLayer layer(format(), LayerSpec{.has_bias = true});
  const auto moe = Create(layer.config());
  const int64_t weights = 4 * 3 * 64 * 96, biases = 4 * (2 * 96 + 64) * 4;
  const auto scales_of = [](int64_t rows, int64_t columns, int64_t depth) {
    return 4 * rows * CeilDiv(columns, depth);
  };
  VisitFormat(format(), [&]<class F>(F) {
    const int64_t depth = kPackedDepthOf<F>;
    const int64_t scales = (2 * scales_of(96, 64, depth) + scales_of(64, 96, depth)) *
                           kBytesOfScale<typename F::Scale>;
    const int64_t bytes = weights * F::kCodeBits / 8 + scales + biases;
    EXPECT_GE(4 * moe->copy_bytes(), bytes);
    EXPECT_LE(4 * moe->copy_bytes(), bytes + bytes / 20);
  });
}

}  // namespace
}  // namespace cpumoe
