// Compares the forward pass of every ISA x format with the scalar reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/moe_test_util.h"
#include "threading/thread_pool.h"

namespace cpumoe {
namespace {

class ForwardTest : public MoeTest {};
CPUMOE_FOR_EACH_ISA_FORMAT_AND_PATH(ForwardTest);

TEST_P(ForwardTest, Shapes) {
  constexpr int64_t kShapes[][2] = {{32, 32}, {32, 160}, {64, 96}, {288, 96}};
  for (const auto& [hidden, intermediate] : kShapes) {
    for (const int64_t tokens : {1, 4, 7}) {
      CheckForward(LayerSpec{.experts = 3, .hidden = hidden, .intermediate = intermediate},
                   BatchSpec{.tokens = tokens});
    }
  }
}

// Rows end within a group, a part of it, a tile of features or a pair of tiles.
TEST_P(ForwardTest, ShapesThatAreNoMultiples) {
  constexpr int64_t kShapes[][2] = {{2, 2}, {20, 50}, {50, 20}, {136, 74}, {98, 10}};
  for (const auto& [hidden, intermediate] : kShapes) {
    VisitFormat(format(), [&]<class F>(F) {
      for (const int64_t tokens : {1, 6, 20}) {
        CheckForward(LayerSpec{.experts = 3,
                               .hidden = OddIfPossible<F>(hidden),
                               .intermediate = OddIfPossible<F>(intermediate),
                               .has_bias = tokens == 6},
                     BatchSpec{.tokens = tokens});
      }
    });
  }
}

// In both products K is longer than one panel.
TEST_P(ForwardTest, DeepProducts) {
  for (const int64_t tokens : {1, 13}) {
    const BatchSpec batch = {.tokens = tokens};
    CheckForward(LayerSpec{.experts = 2, .hidden = 1088, .intermediate = 32}, batch);
    CheckForward(LayerSpec{.experts = 2, .hidden = 32, .intermediate = 1088}, batch);
  }
}

// There are enough tiles for several per task, and the last task has fewer tiles than the others.
TEST_P(ForwardTest, SeveralTilesPerTask) {
  for (const int64_t tokens : {1, 15, 70}) {  // few, many, and many for AMX as well
    if (tokens > 15 && run_.MultipliesBySignals()) break;
    CheckForward(LayerSpec{.experts = 2, .hidden = 544, .intermediate = 288, .has_bias = true},
                 BatchSpec{.tokens = tokens, .top_k = 2});
  }
  // With few tokens the work is divided into smaller tasks.
  CheckForward(LayerSpec{.experts = 2, .hidden = 64, .intermediate = 1056, .has_bias = true},
               BatchSpec{.tokens = 3, .top_k = 2});
  CheckForward(LayerSpec{.experts = 1, .hidden = 4128, .intermediate = 32, .has_bias = true},
               BatchSpec{.tokens = 2, .top_k = 1});
  // More tokens than stream, as digits: the pairs of tiles take turns at 16 groups.
  CheckForward(LayerSpec{.experts = 1, .hidden = 544, .intermediate = 32, .has_bias = true},
               BatchSpec{.tokens = 33, .top_k = 1});
}

TEST_P(ForwardTest, AnyNumberOfTokens) {
  if (multiplies_floats()) ExpectBestDots();
  for (const int64_t tokens : {0, 1, 2, 3, 5, 12, 13, 14, 15, 25, 29, 40}) {
    for (const bool batch_invariant : {false, true}) {
      CheckForward(LayerSpec{.intermediate = 32, .batch_invariant = batch_invariant},
                   BatchSpec{.tokens = tokens});
    }
  }
}

// The tokens of each expert are around the height of one and of two tile registers.
TEST_P(ForwardTest, TokensAroundTileHeights) {
  if (multiplies_floats()) ExpectBestDots();
  const LayerSpec layer = {.experts = 2, .hidden = 96, .intermediate = 32};
  for (const int64_t tokens : {15, 16, 17, 31, 32, 33, 48, 64, 65}) {
    CheckForward(layer, BatchSpec{.tokens = tokens, .top_k = layer.experts});
  }
}

// Results are right whichever kernels take an expert's tokens, even if no fused kernel takes as
// many.
TEST_P(ForwardTest, AnyFewTokenLimit) {
  for (const int few_token_limit : {0, 1, 3, 1000}) {
    for (const int64_t tokens : {1, 2, 4, 14}) {
      const TestLayer layer(format(), LayerSpec{.experts = 2, .few_token_limit = few_token_limit});
      CheckForward(*Create(layer), layer, Batch(layer.config(), BatchSpec{.tokens = tokens}));
    }
  }
}

TEST_P(ForwardTest, AnyTopK) {
  for (const int64_t experts : {1, 5}) {
    for (int64_t top_k = 0; top_k <= experts; ++top_k) {
      for (const int64_t tokens : {1, 3}) {
        CheckForward(LayerSpec{.experts = experts}, BatchSpec{.tokens = tokens, .top_k = top_k});
      }
    }
  }
}

// Hidden states are large enough to reach the limits.
TEST_P(ForwardTest, GluVariantsAndBiases) {
  for (const Glu& glu : {kPlain, kDeepSeekV4, kGptOss, kGemma, kGelu, kRelu2, kSoftCapped,
                         kUngatedRelu2, kUngatedGelu}) {
    for (const bool has_bias : {false, true}) {
      for (const int64_t tokens : {2, 15}) {
        CheckForward(LayerSpec{.glu = glu, .has_bias = has_bias},
                     BatchSpec{.tokens = tokens, .magnitude = 8.0f});
      }
    }
  }
}

TEST_P(ForwardTest, DTypesIdsAndStrides) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const bool wide : {false, true}) {
      for (const int64_t gap : {0, 3}) {
        CheckForward(
            LayerSpec{.intermediate = 32},
            BatchSpec{.tokens = 4, .dtype = dtype, .ids_are_64_bit = wide, .row_gap = gap});
      }
    }
  }
}

// The output's dtype decides how the fp32 sum is rounded, and nothing else.
TEST_P(ForwardTest, AnyOutputDTypeForAnyInputDType) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32});
  const auto moe = Create(layer);
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const int64_t tokens : {1, 15}) {
      BatchSpec spec = {.tokens = tokens, .dtype = dtype, .output_dtype = DType::kFp32};
      const std::vector<double> exact =
          Numbers(DType::kFp32, Forward(*moe, Batch(layer.config(), spec)));
      for (const DType output : {DType::kBf16, DType::kFp16}) {
        spec.output_dtype = output;
        const std::vector<double> rounded =
            Numbers(output, Forward(*moe, Batch(layer.config(), spec)));
        ASSERT_EQ(rounded.size(), exact.size());
        for (size_t i = 0; i < exact.size(); ++i) {
          const auto sum = static_cast<float>(exact[i]);
          EXPECT_EQ(rounded[i], output == DType::kBf16 ? Bf16::FromFloat(sum).ToFloat()
                                                       : Fp16::FromFloat(sum).ToFloat());
        }
      }
    }
  }
}

TEST_P(ForwardTest, AccumulateAddsTheWholeSumOnce) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32, .has_bias = true});
  const auto moe = Create(layer);
  SerialPool pool;
  Workspace workspace;
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    const BatchSpec spec = {.tokens = 17, .dtype = dtype, .output_dtype = DType::kFp32};
    Batch batch(layer.config(), spec);
    batch.ids[2] = batch.ids[3] = -1;  // token 1 keeps what is there
    ForwardArgs args = batch.Args(nullptr);
    args.fp32_as_bf16 = GetParam().fp32_as_bf16;
    std::vector<float> sums(spec.tokens * layer.config().hidden_size, NAN);
    args.output = sums.data();
    moe->Forward(args, pool, workspace);
    std::vector<float> output(sums.size());
    for (size_t i = 0; i < output.size(); ++i) output[i] = 0.37f * static_cast<float>(i % 13);
    std::vector<float> expected = output;
    for (size_t i = 0; i < output.size(); ++i) expected[i] += sums[i];
    args.output = output.data();
    args.accumulate = true;
    moe->Forward(args, pool, workspace);
    EXPECT_EQ(output, expected);
  }
}

TEST_P(ForwardTest, SkipsWhatIsNotOurs) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32});
  const auto moe = Create(layer);
  for (const int64_t tokens : {1, 6}) {
    Batch batch(layer.config(), BatchSpec{.tokens = tokens, .top_k = 3});
    batch.ids[0] = -1;
    batch.ids[2] = layer.config().num_experts;
    CheckForward(*moe, layer, batch);
    batch.mask = {0, 1, 0, 255};
    CheckForward(*moe, layer, batch);
  }
}

TEST_P(ForwardTest, WithoutAnyExpertTheOutputIsZero) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32});
  const auto moe = Create(layer);
  for (const int64_t tokens : {1, 6}) {
    Batch masked(layer.config(), BatchSpec{.tokens = tokens, .dtype = DType::kBf16});
    masked.mask = {1, 1, 1, 1};
    Batch nobodys = masked;
    nobodys.mask.clear();
    std::fill(nobodys.ids.begin(), nobodys.ids.end(), -1);
    for (const Batch& batch : {masked, nobodys}) {
      const std::vector<std::byte> output = Forward(*moe, batch);
      EXPECT_EQ(output, std::vector<std::byte>(output.size(), std::byte{0}));
    }
  }
}

TEST_P(ForwardTest, ExpertsWithoutTokens) {
  const TestLayer layer(format(), LayerSpec{.experts = 6, .intermediate = 32});
  Batch batch(layer.config(), BatchSpec{.tokens = 9});
  for (size_t i = 0; i < batch.ids.size(); ++i) batch.ids[i] = i % 2 == 0 ? 1 : 4;
  CheckForward(*Create(layer), layer, batch);
}

TEST_P(ForwardTest, RepeatedIds) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32});
  const auto moe = Create(layer);
  for (const int64_t tokens : {1, 2, 7}) {
    Batch batch(layer.config(), BatchSpec{.tokens = tokens, .top_k = 4});
    for (size_t i = 0; i < batch.ids.size(); ++i) batch.ids[i] = i % 4 == 1 ? 0 : 2;
    CheckForward(*moe, layer, batch);
  }
}

TEST_P(ForwardTest, MoreSlotsThanExperts) {
  CheckForward(LayerSpec{.experts = 2}, BatchSpec{.tokens = 1, .top_k = 7});
  CheckForward(LayerSpec{.experts = 2}, BatchSpec{.tokens = 4, .top_k = 7});
}

// A call is cut into rounds of at most 16384 slots, which here are two tokens.
TEST_P(ForwardTest, SeveralRounds) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32});
  const auto moe = Create(layer);
  for (const int64_t tokens : {3, 5}) {
    Batch batch(layer.config(), BatchSpec{.tokens = tokens, .top_k = 8192, .row_gap = 1});
    for (size_t i = 0; i < batch.ids.size(); ++i) {
      if (i % 1500 != 0) batch.ids[i] = -1;
    }
    CheckForward(*moe, layer, batch);
  }
}

// Scales lie at both ends of the fp32 range, where folding them into the multiplicands would
// overflow or lose bits. The hidden states keep the result in range.
TEST_P(ForwardTest, ExtremeScales) {
  if (VisitFormat(format(),
                  []<class F>(F) { return !HasScales<F> || requires { F::kGreatestScale; }; })) {
    GTEST_SKIP() << "there are no such scales";
  }
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr Magnitudes kHuge = {0x1p125f, kLargest}, kTiny = {0x1p-127f, 0x1p-122f};
  for (const bool panel : {false, true}) {
    const LayerSpec spec = {.intermediate = 32, .batch_invariant = panel};
    const auto check = [&](const Magnitudes& gate_up, const Magnitudes& down, float magnitude) {
      LayerSpec layer = spec;
      layer.gate_up_scales = gate_up;
      layer.down_scales = down;
      CheckForward(layer, BatchSpec{.tokens = 5, .magnitude = magnitude});
    };
    // Sums are not scaled yet where codes are multiplied.
    const float codes =
        VisitFormat(format(), []<class F>(F) { return ForCodes<F>({1.0f, 1.0f}).least; });
    check(kHuge, kModerate, 0x1p-100f * codes);
    check(kModerate, kHuge, 0x1p-20f * codes);
    check(kTiny, kModerate, 0x1p120f * codes);
    check(kModerate, kTiny, 0x1p30f);
  }
}

TEST_P(ForwardTest, ANanStaysInItsToken) {
  const TestLayer layer(format(), LayerSpec{.intermediate = 32});
  const auto moe = Create(layer);
  const int64_t hidden = layer.config().hidden_size;
  for (const int64_t tokens : {2, 16}) {
    Batch batch(layer.config(), BatchSpec{.tokens = tokens});
    const std::vector<double> clean = Numbers(DType::kFp32, Forward(*moe, batch));
    for (const float poison : {NAN, INFINITY}) {
      batch.SetHiddenState(1, 5, poison);
      const std::vector<double> output = Numbers(DType::kFp32, Forward(*moe, batch));
      for (int64_t i = 0; i < tokens * hidden; ++i) {
        if (i / hidden == 1) {
          EXPECT_TRUE(std::isnan(output[i]) || poison == INFINITY) << i;
          EXPECT_FALSE(std::isfinite(output[i])) << i;
        } else {
          EXPECT_EQ(output[i], clean[i]) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace cpumoe
