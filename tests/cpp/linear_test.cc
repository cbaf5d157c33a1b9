// One packed matrix, for every ISA x format x path: products, any number of threads, export,
// errors.
#include "linear/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "cpp/all_formats.h"
#include "cpp/isa_test.h"
#include "cpp/message_of.h"
#include "cpp/moe_test_util.h"
#include "cpp/reference_weight.h"
#include "cpp/test_matrix.h"
#include "threading/pinned_pool.h"

namespace cpumoe {
namespace {

// The inputs of a call, whose activations every path holds exactly: in each group multiples, up to
// 127 times, of one power of two.
struct Input {
  int64_t tokens, columns, stride;
  DType dtype;
  std::vector<std::byte> elements;
  std::vector<double> values;  // [tokens, columns]

  Input(int64_t tokens, int64_t columns, DType dtype, Rng& rng, int64_t gap = 0)
      : tokens(tokens),
        columns(columns),
        stride(columns + gap),
        dtype(dtype),
        elements(tokens * stride * ByteSize(dtype), std::byte{0xff}) {
    std::uniform_int_distribution<int> value(-127, 127), exponent(-7, -3);
    for (int64_t i = 0, power = 0; i < tokens * columns; ++i) {
      const bool begins = i % columns % kGroupSize == 0;  // a group
      if (begins) power = exponent(rng);
      const int number = begins ? -127 : value(rng);
      values.push_back(std::ldexp(number, static_cast<int>(power)));
      Set(i / columns * stride + i % columns, static_cast<float>(values.back()));
    }
  }

  void Set(int64_t index, float value) {
    std::byte* at = elements.data() + index * ByteSize(dtype);
    const auto store = [at](auto element) { std::memcpy(at, &element, sizeof(element)); };
    if (dtype == DType::kBf16) {
      store(Bf16::FromFloat(value));
    } else if (dtype == DType::kFp16) {
      store(Fp16::FromFloat(value));
    } else {
      store(value);
    }
  }
};

class LinearTest : public IsaFormatTest {
 protected:
  std::unique_ptr<Linear> Empty(LinearConfig config) const {
    config.kernels.precision = precision();
    return std::unique_ptr<Linear>(entry().create_linear(config));
  }
  std::unique_ptr<Linear> Create(const TestMatrix& matrix, const float* bias = nullptr,
                                 const KernelOptions& kernels = {}) const {
    SerialPool pool;
    const RawMatrix view = matrix.View();
    auto linear = Empty({view.rows, view.columns, bias != nullptr, kernels});
    linear->Pack(view, bias, pool);
    return linear;
  }

  std::vector<std::byte> Forward(const Linear& linear, const Input& input, DType output_dtype,
                                 ThreadPool& pool, int64_t gap = 0) const {
    const int64_t stride = linear.config().out_features + gap;
    std::vector<std::byte> output(input.tokens * stride * ByteSize(output_dtype), std::byte{0xff});
    ScratchMemory scratch;
    linear.Forward({.input_dtype = input.dtype,
                    .output_dtype = output_dtype,
                    .fp32_as_bf16 = GetParam().fp32_as_bf16,
                    .x = input.elements.data(),
                    .x_stride = input.stride,
                    .tokens = input.tokens,
                    .output = output.data(),
                    .output_stride = stride},
                   pool, scratch);
    return output;
  }

  // Compares a product, on two threads, with sums in double precision. Rows of input and output are
  // `gap` elements further apart than they are long.
  void Check(int64_t rows, int64_t columns, int64_t tokens, DType dtype, DType output_dtype,
             bool biased, int64_t gap = 0, const KernelOptions& kernels = {}) {
    const auto matrix = TestMatrix::Random(format(), rows, columns, rng_);
    std::vector<float> bias(rows);
    std::normal_distribution<float> normal;
    for (float& b : bias) b = normal(rng_);
    const Input input(tokens, columns, dtype, rng_, gap);
    PinnedPool pool({.threads = 2});
    const auto linear = Create(matrix, biased ? bias.data() : nullptr, kernels);
    const std::vector<double> actual =
        Numbers(output_dtype, Forward(*linear, input, output_dtype, pool, gap));
    const std::vector<double> weights = Weights(matrix);
    const double roundoff = output_dtype == DType::kBf16   ? 0x1p-8
                            : output_dtype == DType::kFp16 ? 0x1p-11
                                                           : 0.0;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < rows + gap; ++n) {
        const double got = actual[t * (rows + gap) + n];
        if (n >= rows) {
          EXPECT_TRUE(std::isnan(got)) << "written behind row " << t;
          continue;
        }
        double sum = biased ? bias[n] : 0.0, size = std::fabs(sum);
        for (int64_t k = 0; k < columns; ++k) {
          const double product = weights[n * columns + k] * input.values[t * columns + k];
          sum += product;
          size += std::fabs(product);
        }
        const double bound =
            0x1p-24 * static_cast<double>(columns + 8) * size + roundoff * std::fabs(sum) + 0x1p-24;
        ASSERT_NEAR(got, sum, bound) << "token " << t << ", feature " << n << " of " << rows
                                     << " x " << columns << ", " << tokens << " tokens";
      }
    }
  }

  std::vector<double> Weights(const TestMatrix& matrix) const {
    return VisitFormat(format(), [&]<class F>(F) {
      const RawMatrix view = matrix.View();
      std::vector<double> weights;
      for (int64_t i = 0; i < view.rows * view.columns; ++i) {
        const int64_t row = i / view.columns, column = i % view.columns;
        weights.push_back(view.factor * ReferenceWeight<F>(view, row, column));
      }
      return weights;
    });
  }

  Rng rng_{7};
};
CPUMOE_FOR_EACH_ISA_FORMAT_AND_PATH(LinearTest);

TEST_P(LinearTest, ProductsOfAnyShape) {
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{1, 32}, {16, 2}, {33, 96}, {100, 140}, {49, 288}, {5, 78}}) {
    for (const int64_t tokens : {1, 2, 5, 17, 40}) {
      const int64_t given = VisitFormat(format(), [columns = columns]<class F>(F) {
        return columns % kGroupSize == 0 ? columns : OddIfPossible<F>(columns);
      });
      Check(rows, given, tokens, DType::kFp32, DType::kFp32, tokens % 2 == 0);
    }
  }
}

TEST_P(LinearTest, EveryDtypeOfInputsAndOutputs) {
  for (const DType input : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const DType output : {DType::kBf16, DType::kFp16, DType::kFp32}) {
      for (const int64_t tokens : {1, 20}) Check(40, 64, tokens, input, output, true, 5);
    }
  }
}

TEST_P(LinearTest, MoreTokensThanARound) {
  const int64_t tokens = run_.MultipliesBySignals() ? 520 : 1100;
  Check(20, 32, tokens, DType::kBf16, DType::kFp32, true);
}

TEST_P(LinearTest, TheSameBitsForAnyNumberOfThreads) {
  const auto matrix = TestMatrix::Random(format(), 300, 128, rng_);
  const auto linear = Create(matrix);
  for (const int64_t tokens : {1, 3, 50}) {
    const Input input(tokens, 128, DType::kFp32, rng_);
    SerialPool one;
    const auto expected = Forward(*linear, input, DType::kFp32, one);
    for (const int threads : {2, 5}) {
      PinnedPool pool({.threads = threads});
      EXPECT_EQ(Forward(*linear, input, DType::kFp32, pool), expected) << threads << " threads";
    }
  }
}

// Rows are divided among nodes, which are made up here.
TEST_P(LinearTest, TheSameBitsForAnyNumberOfNodes) {
  const auto matrix = TestMatrix::Random(format(), 300, 128, rng_);
  const auto whole = Create(matrix);
  for (const std::vector<int>& threads : {std::vector<int>{1, 1}, {2, 1, 1}, {1, 5, 1, 1}}) {
    const std::vector<NodeThreads> nodes = MadeUpNodes(threads);
    LinearConfig config = {.out_features = 300, .in_features = 128};
    for (const NodeThreads& node : nodes) config.nodes.push_back(node.memory);
    const auto divided = Empty(config);
    PinnedPool pool({.nodes = nodes});
    divided->Pack(matrix.View(), nullptr, pool);
    EXPECT_EQ(divided->memory().size(), nodes.size());
    for (const int64_t tokens : {1, 3, 50}) {
      if (run_.MultipliesBySignals() && tokens > 3) continue;
      const Input input(tokens, 128, DType::kFp32, rng_);
      SerialPool one;
      const auto expected = Forward(*whole, input, DType::kFp32, one);
      EXPECT_EQ(Forward(*divided, input, DType::kFp32, pool), expected);
      EXPECT_EQ(Forward(*divided, input, DType::kFp32, one), expected);
    }
    TestMatrix out(format(), 300, 128);
    divided->Unpack(out.MutableView(), pool);
    EXPECT_TRUE(out == matrix);
  }
}

TEST_P(LinearTest, ABatchInvariantTokenDoesNotDependOnItsBatch) {
  const auto matrix = TestMatrix::Random(format(), 64, 96, rng_);
  const auto linear = Create(matrix, nullptr, {.batch_invariant = true});
  SerialPool pool;
  const Input many(37, 96, DType::kBf16, rng_);
  const auto all = Forward(*linear, many, DType::kFp32, pool);
  Input one = many;
  one.tokens = 1;
  const auto first = Forward(*linear, one, DType::kFp32, pool);
  EXPECT_TRUE(std::equal(first.begin(), first.end(), all.begin()));
}

TEST_P(LinearTest, ExportIsBitForBit) {
  const int64_t unit = VisitFormat(format(), []<class F>(F) { return ColumnUnit<F>(); });
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{1, 3 * unit}, {40, 3 * unit - 6}, {129, unit + 10}}) {
    const auto matrix = TestMatrix::Random(format(), rows, columns, rng_, {}, /*gap=*/32);
    const auto linear = Create(matrix);
    TestMatrix out(format(), rows, columns, /*gap=*/32);
    PinnedPool pool({.threads = 2});
    linear->Unpack(out.MutableView(), pool);
    EXPECT_TRUE(out == matrix);
    EXPECT_GE(linear->bytes(), rows * columns / 2);
  }
}

TEST_P(LinearTest, WhatDoesNotFitIsRefused) {
  const auto message = [](auto&& body) { return MessageOf<std::invalid_argument>(body); };
  EXPECT_EQ(message([&] { Empty({0, 64, false, {}}); }),
            "out_features: expected 1 to 16777216, got 0");
  EXPECT_EQ(message([&] { Empty({64, -32, false, {}}); }),
            "in_features: expected 1 to 16777216, got -32");
  VisitFormat(format(), [&]<class F>(F) {
    if (F::kCodeBits >= 8) return;
    EXPECT_EQ(message([&] { Empty({64, 33, false, {}}); }),
              Message(F::kName,
                      ": in_features must be a multiple of 2, because a byte has 2 codes, got 33"));
  });
  const auto matrix = TestMatrix::Random(format(), 32, 64, rng_);
  SerialPool pool;
  EXPECT_EQ(message([&] { Empty({16, 64, false, {}})->Pack(matrix.View(), nullptr, pool); }),
            "test.weight: expected [16, 64] weights, got [32, 64]");
  EXPECT_EQ(message([&] { Empty({32, 64, true, {}})->Pack(matrix.View(), nullptr, pool); }),
            "test.weight: expected a bias, got none");
  const std::vector<float> bias(32);
  EXPECT_EQ(message([&] { Empty({32, 64, false, {}})->Pack(matrix.View(), bias.data(), pool); }),
            "test.weight: expected no bias, got one");
  const auto linear = Create(matrix);
  TestMatrix out(format(), 16, 64);
  EXPECT_EQ(message([&] { linear->Unpack(out.MutableView(), pool); }),
            "test.weight: expected [32, 64] weights, got [16, 64]");
}

}  // namespace
}  // namespace cpumoe
