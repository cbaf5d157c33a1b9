// RMS norms against a computation in double.
#include "engine/rms_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpp/message_of.h"

namespace cpumoe {
namespace {

constexpr DType kDTypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};

// Numbers as a dtype stores them.
class Numbers {
 public:
  Numbers(DType dtype, const std::vector<float>& values)
      : dtype_(dtype), bytes_(values.size() * ByteSize(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) {
      const Bf16 bf16 = Bf16::FromFloat(values[i]);
      const Fp16 fp16 = Fp16::FromFloat(values[i]);
      const void* stored = &values[i];
      if (dtype == DType::kBf16) stored = &bf16;
      if (dtype == DType::kFp16) stored = &fp16;
      std::memcpy(bytes_.data() + i * ByteSize(dtype), stored, ByteSize(dtype));
    }
  }

  void* data() { return bytes_.data(); }

  double operator[](int64_t i) const {
    double value = 0;
    const auto get = [&](const auto* first) {
      if constexpr (requires { first->ToFloat(); }) {
        value = first[i].ToFloat();
      } else {
        value = first[i];
      }
    };
    VisitElements(dtype_, bytes_.data(), get);
    return value;
  }

  bool operator==(const Numbers& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

class RmsNormTest : public testing::Test {
 protected:
  std::vector<float> Random(int64_t count, float size = 1) {
    std::normal_distribution<float> normal(0, size);
    std::vector<float> values(count);
    for (float& value : values) value = normal(rng_);
    return values;
  }

  Numbers Zeros(DType dtype, int64_t count) { return {dtype, std::vector<float>(count)}; }

  std::shared_ptr<Runtime> runtime_ = Runtime::Create({.node = {.threads = 2}});
  std::mt19937 rng_{1};
};

TEST_F(RmsNormTest, ResultsAreRoundedOnce) {
  constexpr double kEps = 1e-5;
  for (const int64_t columns : {1, 7, 256, 300, 2881}) {
    for (const int64_t rows : {1, 5, 40}) {
      for (const DType dtype : kDTypes) {
        for (const DType weight_dtype : kDTypes) {
          Numbers x(dtype, Random(rows * columns, rows == 5 ? 1e-3f : 3.0f));
          Numbers weight(weight_dtype, Random(columns));
          Numbers y = Zeros(dtype, rows * columns);
          const bool one_plus = rows != 1, has_weight = columns != 7;
          RmsNorm(*runtime_, {.dtype = dtype,
                              .rows = rows,
                              .columns = columns,
                              .x = x.data(),
                              .y = y.data(),
                              .weight_dtype = weight_dtype,
                              .weight = has_weight ? weight.data() : nullptr,
                              .one_plus = one_plus,
                              .eps = kEps});
          const double unit = dtype == DType::kBf16 ? 0x1p-8 : dtype == DType::kFp16 ? 0x1p-11 : 0;
          for (int64_t row = 0; row < rows; ++row) {
            double squares = 0;
            for (int64_t k = 0; k < columns; ++k) squares += std::pow(x[row * columns + k], 2);
            const double root = std::sqrt(squares / static_cast<double>(columns) + kEps);
            for (int64_t k = 0; k < columns; ++k) {
              const double scale =
                  has_weight ? static_cast<float>(weight[k]) + (one_plus ? 1.0f : 0.0f) : 1;
              const double expected = x[row * columns + k] / root * scale;
              ASSERT_NEAR(y[row * columns + k], expected,
                          (unit + 1e-6) * std::abs(expected) + 0x1p-24);
            }
          }
        }
      }
    }
  }
}

TEST_F(RmsNormTest, ManyRowsAndFewHaveTheSameBits) {
  constexpr int64_t kRows = 301, kColumns = 515;
  ASSERT_TRUE(IsLongRmsNorm(kRows, kColumns));
  Numbers x(DType::kFp32, Random(kRows * kColumns)), weight(DType::kFp32, Random(kColumns));
  Numbers whole = Zeros(DType::kFp32, kRows * kColumns), parts = whole;
  RmsNormArgs args = {.dtype = DType::kFp32,
                      .rows = kRows,
                      .columns = kColumns,
                      .x = x.data(),
                      .y = whole.data(),
                      .weight_dtype = DType::kFp32,
                      .weight = weight.data(),
                      .eps = 1e-6};
  RmsNorm(*runtime_, args);
  args.rows = 1;
  for (int64_t row = 0; row < kRows; ++row) {
    args.x = static_cast<float*>(x.data()) + row * kColumns;
    args.y = static_cast<float*>(parts.data()) + row * kColumns;
    RmsNorm(*runtime_, args);
  }
  EXPECT_EQ(whole, parts);
  args.rows = kRows;
  args.x = args.y = x.data();
  RmsNorm(*runtime_, args);  // in place
  EXPECT_EQ(whole, x);
}

TEST_F(RmsNormTest, InfinitiesNaNsAndZeros) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : kDTypes) {
    Numbers x(dtype, {1, infinity, 2, NAN, 0, 0});
    Numbers y = Zeros(dtype, 6);
    RmsNormArgs args = {
        .dtype = dtype, .rows = 3, .columns = 2, .x = x.data(), .y = y.data(), .eps = 1e-6};
    RmsNorm(*runtime_, args);
    EXPECT_EQ(y[0], 0);
    for (const int i : {1, 2, 3}) EXPECT_TRUE(std::isnan(y[i])) << i;
    for (const int i : {4, 5}) EXPECT_EQ(y[i], 0) << i;
    args.eps = 0;
    RmsNorm(*runtime_, args);
    EXPECT_TRUE(std::isnan(y[4]));
  }
}

TEST_F(RmsNormTest, WrongArguments) {
  float number = 1;
  const RmsNormArgs right = {
      .dtype = DType::kFp32, .rows = 1, .columns = 1, .x = &number, .y = &number};
  const auto message = [&](auto change) {
    RmsNormArgs args = right;
    change(args);
    return MessageOf<std::invalid_argument>([&] { RmsNorm(*runtime_, args); });
  };
  EXPECT_EQ(message([](RmsNormArgs& args) { args.columns = 0; }),
            "columns: expected 1 to 4194304, got 0");
  EXPECT_EQ(message([](RmsNormArgs& args) { args.rows = -1; }),
            "rows: expected 0 to 1099511627776, got -1");
  EXPECT_EQ(message([](RmsNormArgs& args) { args.eps = -1; }),
            "eps: expected a number that is not negative, got -1");
  EXPECT_EQ(message([](RmsNormArgs& args) { args.x = nullptr; }),
            "x: expected an address, got a null pointer");
  EXPECT_EQ(message([](RmsNormArgs& args) { args.y = nullptr; }),
            "y: expected an address, got a null pointer");
  RmsNorm(*runtime_, {.rows = 0, .columns = 3});  // nothing to do
}

}  // namespace
}  // namespace cpumoe
