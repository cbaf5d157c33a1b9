// Sums of results that were computed apart from each other have the bits of a forward pass, and
// those of scalar arithmetic.
#include "moe/weighted_sum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpp/moe_test_util.h"
#include "dispatch/cpu_features.h"
#include "threading/pinned_pool.h"

namespace cpumoe {
namespace {

// Terms of several tokens, in random order.
struct Terms {
  std::vector<float> values;  // [rows, columns]
  std::vector<int64_t> begins, rows;
  std::vector<float> weights;

  WeightedSumArgs Args(DType dtype, int64_t columns, std::vector<std::byte>& output) const {
    const auto tokens = std::ssize(begins) - 1;
    output.assign(tokens * columns * ByteSize(dtype), std::byte{0xff});
    return {.output_dtype = dtype,
            .tokens = tokens,
            .columns = columns,
            .terms = values.data(),
            .num_rows = columns == 0 ? 0 : std::ssize(values) / columns,
            .begins = begins.data(),
            .rows = rows.data(),
            .weights = weights.data(),
            .output = output.data()};
  }
};

Terms RandomTerms(int64_t tokens, int64_t most, int64_t columns, Rng& rng) {
  Terms terms{.values = {}, .begins = {0}, .rows = {}, .weights = {}};
  std::normal_distribution<float> normal;
  for (int64_t t = 0; t < tokens; ++t) {
    terms.begins.push_back(terms.begins.back() + static_cast<int64_t>(rng() % (most + 1)));
  }
  terms.rows.resize(terms.begins.back());
  std::iota(terms.rows.begin(), terms.rows.end(), 0);
  std::shuffle(terms.rows.begin(), terms.rows.end(), rng);
  for (size_t i = 0; i < terms.rows.size(); ++i) terms.weights.push_back(normal(rng));
  terms.values.resize(terms.rows.size() * columns);
  for (float& value : terms.values) value = normal(rng);
  return terms;
}

class WeightedSumTest : public IsaTest {
 protected:
  bool fuses() const {
    for (const IsaRow& row : KnownIsas()) {
      if (row.name == GetParam()) return std::ranges::count(row.features, "fma") != 0;
    }
    return false;
  }

  // fp32 sums by scalar arithmetic.
  std::vector<float> Expected(const Terms& terms, int64_t columns) const {
    std::vector<float> sums;
    for (size_t t = 0; t + 1 < terms.begins.size(); ++t) {
      for (int64_t c = 0; c < columns; ++c) {
        float sum = 0.0f;
        for (int64_t i = terms.begins[t]; i < terms.begins[t + 1]; ++i) {
          const float term = terms.values[terms.rows[i] * columns + c];
          if (fuses()) {
            sum = std::fma(terms.weights[i], term, sum);
          } else {
            const volatile float product = terms.weights[i] * term;
            sum = product + sum;
          }
        }
        sums.push_back(sum);
      }
    }
    return sums;
  }
};
CPUMOE_FOR_EACH_ISA(WeightedSumTest);

TEST_P(WeightedSumTest, ScalarArithmetic) {
  Rng rng(1);
  PinnedPool pool({.threads = 3});
  SerialPool serial;
  for (const int64_t columns : {0, 1, 15, 16, 33, 512, 1200}) {
    for (const int64_t tokens : {0, 1, 2, 70}) {
      const Terms terms = RandomTerms(tokens, 7, columns, rng);
      std::vector<float> expected = Expected(terms, columns);
      std::vector<std::byte> output;
      const WeightedSumArgs args = terms.Args(DType::kFp32, columns, output);
      for (ThreadPool* each : std::initializer_list<ThreadPool*>{&pool, &serial}) {
        std::ranges::fill(output, std::byte{0xff});
        run_.variant().weighted_sum(args, *each);
        EXPECT_TRUE(
            std::equal(output.begin(), output.end(), reinterpret_cast<std::byte*>(expected.data())))
            << tokens << " tokens, " << columns << " columns";
      }
    }
  }
}

TEST_P(WeightedSumTest, RoundedOnceToTheOutputsType) {
  Rng rng(2);
  SerialPool pool;
  const int64_t columns = 37;
  const Terms terms = RandomTerms(5, 4, columns, rng);
  const std::vector<float> expected = Expected(terms, columns);
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    std::vector<std::byte> output;
    run_.variant().weighted_sum(terms.Args(dtype, columns, output), pool);
    const std::vector<double> got = Numbers(dtype, output);
    for (size_t i = 0; i < expected.size(); ++i) {
      const float rounded = dtype == DType::kBf16 ? Bf16::FromFloat(expected[i]).ToFloat()
                                                  : Fp16::FromFloat(expected[i]).ToFloat();
      EXPECT_EQ(got[i], rounded) << i;
    }
  }
}

// The pairs of a call as tokens of their own with weight 1, and their weighted sums.
class SumsOfCallsTest : public MoeTest {};
CPUMOE_FOR_EACH_ISA_FORMAT_AND_PATH(SumsOfCallsTest);

TEST_P(SumsOfCallsTest, HaveTheBitsOfACall) {
  const int64_t top_k = 3, hidden = 72;
  const TestLayer layer(format(), LayerSpec{.hidden = hidden, .has_bias = true});
  const auto moe = Create(layer);
  for (const int64_t tokens : {1, 6}) {
    const Batch whole(layer.config(), BatchSpec{.tokens = tokens, .top_k = top_k});
    Batch pairs(layer.config(), BatchSpec{.tokens = tokens * top_k, .top_k = 1});
    Terms terms{.values = {}, .begins = {0}, .rows = {}, .weights = {}};
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
        pairs.ids[pair] = whole.ids[pair];
        pairs.weights[pair] = 1.0f;
        for (int64_t k = 0; k < hidden; ++k) {
          pairs.SetHiddenState(pair, k, static_cast<float>(whole.HiddenState(t, k)));
        }
        terms.rows.push_back(pair);
      }
      std::sort(terms.rows.end() - top_k, terms.rows.end(),
                [&](int64_t a, int64_t b) { return whole.ids[a] < whole.ids[b]; });
      terms.begins.push_back((t + 1) * top_k);
    }
    for (const int64_t pair : terms.rows) terms.weights.push_back(whole.weights[pair]);
    const std::vector<std::byte> results = Forward(*moe, pairs);
    terms.values.resize(results.size() / sizeof(float));
    std::memcpy(terms.values.data(), results.data(), results.size());
    std::vector<std::byte> sums;
    SerialPool pool;
    run_.variant().weighted_sum(terms.Args(DType::kFp32, hidden, sums), pool);
    EXPECT_EQ(sums, Forward(*moe, whole)) << tokens << " tokens";
  }
}

}  // namespace
}  // namespace cpumoe
