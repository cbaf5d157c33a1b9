// Products with matrices as PyTorch stores them, against sums in double.
#include "engine/row_product.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpp/message_of.h"

namespace cpumoe {
namespace {

float ToFloat(float value) { return value; }
float ToFloat(Bf16 value) { return value.ToFloat(); }

template <class T>
std::vector<T> Random(int64_t count, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) {
    if constexpr (sizeof(T) == sizeof(float)) {
      value = normal(rng);
    } else {
      value = T::FromFloat(normal(rng));
    }
  }
  return values;
}

template <class T>
class RowProductTest : public testing::Test {
 protected:
  static constexpr DType kDType = sizeof(T) == sizeof(float) ? DType::kFp32 : DType::kBf16;
  static constexpr double kUnit = sizeof(T) == sizeof(float) ? 0 : 0x1p-8;

  std::vector<float> Compute(const std::vector<T>& x, const std::vector<T>& w, int64_t tokens,
                             int64_t columns) {
    const auto rows = static_cast<int64_t>(w.size()) / columns;
    std::vector<T> y(tokens * rows);
    RowProduct(*runtime_, {.dtype = kDType,
                           .tokens = tokens,
                           .rows = rows,
                           .columns = columns,
                           .x = x.data(),
                           .w = w.data(),
                           .y = y.data()});
    std::vector<float> results;
    for (const T value : y) results.push_back(ToFloat(value));
    return results;
  }

  std::shared_ptr<Runtime> runtime_ = Runtime::Create({.node = {.threads = 2}});
  std::mt19937 rng_{1};
};

using Types = testing::Types<Bf16, float>;
TYPED_TEST_SUITE(RowProductTest, Types);

TYPED_TEST(RowProductTest, ResultsAreRoundedOnce) {
  for (const int64_t columns : {1, 15, 16, 40, 333, 4096}) {
    for (const int64_t rows : {1, 7, 500}) {
      for (int64_t tokens = 1; tokens <= kMostRowProductTokens; ++tokens) {
        const auto x = Random<TypeParam>(tokens * columns, this->rng_);
        const auto w = Random<TypeParam>(rows * columns, this->rng_);
        const std::vector<float> y = this->Compute(x, w, tokens, columns);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t row = 0; row < rows; ++row) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < columns; ++k) {
              const double product =
                  double{ToFloat(x[t * columns + k])} * ToFloat(w[row * columns + k]);
              sum += product;
              size += std::abs(product);
            }
            ASSERT_NEAR(y[t * rows + row], sum, this->kUnit * std::abs(sum) + 1e-6 * size)
                << tokens << " " << rows << " " << columns;
          }
        }
      }
    }
  }
}

TYPED_TEST(RowProductTest, ATokensResultDoesNotDependOnOtherTokens) {
  constexpr int64_t kColumns = 100, kRows = 900;
  const auto w = Random<TypeParam>(kRows * kColumns, this->rng_);
  const auto x = Random<TypeParam>(kMostRowProductTokens * kColumns, this->rng_);
  const std::vector<float> all = this->Compute(x, w, kMostRowProductTokens, kColumns);
  for (int64_t t = 0; t < kMostRowProductTokens; ++t) {
    const std::vector<TypeParam> token(x.begin() + t * kColumns, x.begin() + (t + 1) * kColumns);
    const std::vector<float> wanted(all.begin() + t * kRows, all.begin() + (t + 1) * kRows);
    EXPECT_EQ(this->Compute(token, w, 1, kColumns), wanted);
  }
}

TEST(RowProduct, WrongArguments) {
  const std::shared_ptr<Runtime> runtime = Runtime::Create({});
  float number = 1;
  const auto message = [&](auto change) {
    RowProductArgs args = {.dtype = DType::kFp32,
                           .tokens = 1,
                           .rows = 1,
                           .columns = 1,
                           .x = &number,
                           .w = &number,
                           .y = &number};
    change(args);
    return MessageOf<std::invalid_argument>([&] { RowProduct(*runtime, args); });
  };
  using Args = RowProductArgs;
  EXPECT_EQ(message([](Args& args) { args.dtype = DType::kFp16; }),
            "dtype: expected bf16 or fp32, got fp16");
  EXPECT_EQ(message([](Args& args) { args.tokens = 5; }), "tokens: expected 0 to 4, got 5");
  EXPECT_EQ(message([](Args& args) { args.rows = 0; }), "rows: expected 1 to 16777216, got 0");
  EXPECT_EQ(message([](Args& args) { args.columns = 0; }),
            "columns: expected 1 to 16777216, got 0");
  EXPECT_EQ(message([](Args& args) { args.x = nullptr; }),
            "x: expected an address, got a null pointer");
  EXPECT_EQ(message([](Args& args) { args.w = nullptr; }),
            "w: expected an address, got a null pointer");
  EXPECT_EQ(message([](Args& args) { args.y = nullptr; }),
            "y: expected an address, got a null pointer");
  RowProduct(*runtime, {.rows = 1, .columns = 1});  // no tokens
}

}  // namespace
}  // namespace cpumoe
