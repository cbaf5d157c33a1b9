// Compares the scalar conversions with a model in double precision. The model knows only the number
// of significant bits and the exponent range of a format.
#include "base/float_types.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "formats/scale_grid.h"

namespace cpumoe {
namespace {

template <class Type>
struct Traits;
template <>
struct Traits<Bf16> {
  static constexpr int kDigits = 8, kMinExponent = -126, kMaxExponent = 127;
};
template <>
struct Traits<Fp16> {
  static constexpr int kDigits = 11, kMinExponent = -14, kMaxExponent = 15;
};

// Returns the number that `bits` stand for. Their order is sign, exponent, mantissa, most
// significant first.
template <class Type>
double Decode(uint16_t bits) {
  constexpr int kMantissaBits = Traits<Type>::kDigits - 1;
  const int mantissa = bits & ((1 << kMantissaBits) - 1);
  const int exponent = (bits & 0x7fff) >> kMantissaBits;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == Traits<Type>::kMaxExponent - Traits<Type>::kMinExponent + 2) {
    const double infinity = std::numeric_limits<double>::infinity();
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * infinity;
  }
  const double significand = exponent == 0 ? mantissa : mantissa + (1 << kMantissaBits);
  const int shift = Traits<Type>::kMinExponent - kMantissaBits + (exponent == 0 ? 0 : exponent - 1);
  return sign * std::ldexp(significand, shift);
}

// Returns `value` rounded to the type's precision, ties to even.
template <class Type>
double Round(double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), Traits<Type>::kMinExponent);
  const double quantum = std::ldexp(1.0, exponent - (Traits<Type>::kDigits - 1));
  const double rounded = std::nearbyint(value / quantum) * quantum;
  const double beyond = std::ldexp(1.0, Traits<Type>::kMaxExponent + 1);
  const double infinity = std::numeric_limits<double>::infinity();
  return std::fabs(rounded) < beyond ? rounded : std::copysign(infinity, value);
}

template <class Type>
void CheckFromFloat(float value) {
  const Type actual = Type::FromFloat(value);
  if (std::isnan(value)) {
    ASSERT_TRUE(std::isnan(Decode<Type>(actual.bits))) << std::bit_cast<uint32_t>(value);
    return;
  }
  ASSERT_EQ(Decode<Type>(actual.bits), Round<Type>(value)) << std::hexfloat << value;
  ASSERT_EQ((actual.bits & 0x8000) != 0, std::signbit(value)) << std::hexfloat << value;
}

template <class Type>
class FloatTypeTest : public testing::Test {};
using Types = testing::Types<Bf16, Fp16>;
TYPED_TEST_SUITE(FloatTypeTest, Types);

TYPED_TEST(FloatTypeTest, ToFloatIsExact) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const float actual = TypeParam{static_cast<uint16_t>(bits)}.ToFloat();
    const double expected = Decode<TypeParam>(static_cast<uint16_t>(bits));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(actual)) << bits;
    } else {
      ASSERT_EQ(actual, expected) << bits;
      ASSERT_EQ(std::signbit(actual), std::signbit(expected)) << bits;
    }
  }
}

TYPED_TEST(FloatTypeTest, RoundTrip) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto word = static_cast<uint16_t>(bits);
    const uint16_t back = TypeParam::FromFloat(TypeParam{word}.ToFloat()).bits;
    if (std::isnan(Decode<TypeParam>(word))) {
      ASSERT_TRUE(std::isnan(Decode<TypeParam>(back))) << bits;
    } else {
      ASSERT_EQ(back, word);
    }
  }
}

// Converts every number of the type, every tie between two of them, and the floats on both sides of
// each.
TYPED_TEST(FloatTypeTest, FromFloatRoundsToNearestEven) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const double low = Decode<TypeParam>(static_cast<uint16_t>(bits));
    if (!std::isfinite(low)) break;
    double high = Decode<TypeParam>(static_cast<uint16_t>(bits + 1));
    if (!std::isfinite(high)) high = std::ldexp(1.0, Traits<TypeParam>::kMaxExponent + 1);
    for (const double centre : {low, (low + high) / 2}) {
      const auto middle = static_cast<float>(centre);
      for (const float value :
           {std::nextafter(middle, -infinity), middle, std::nextafter(middle, infinity)}) {
        CheckFromFloat<TypeParam>(value);
        CheckFromFloat<TypeParam>(-value);
      }
    }
  }
}

TYPED_TEST(FloatTypeTest, FromAnyFloat) {
  using Limits = std::numeric_limits<float>;
  for (const float value : {Limits::infinity(), Limits::quiet_NaN(), Limits::signaling_NaN(),
                            Limits::max(), Limits::min(), Limits::denorm_min(), 0.0f}) {
    CheckFromFloat<TypeParam>(value);
    CheckFromFloat<TypeParam>(-value);
  }
  // The payload of these NaNs lies only in the bits that are cut off.
  CheckFromFloat<TypeParam>(std::bit_cast<float>(0x7f800001u));
  CheckFromFloat<TypeParam>(std::bit_cast<float>(0xff800001u));
  std::mt19937 random(1);
  for (int i = 0; i < 1'000'000; ++i)
    CheckFromFloat<TypeParam>(std::bit_cast<float>(static_cast<uint32_t>(random())));
}

TEST(E8M0Test, AllBytes) {
  for (int byte = 0; byte < 255; ++byte) {
    const E8M0 scale{static_cast<uint8_t>(byte)};
    EXPECT_FALSE(scale.IsNan());
    EXPECT_EQ(scale.ToFloat(), std::ldexp(1.0, byte - 127)) << byte;
    EXPECT_EQ(scale.ToBf16().ToFloat(), scale.ToFloat()) << byte;
  }
  EXPECT_EQ(E8M0{0}.ToBf16().bits, 0x0040);  // 2^-127, subnormal
  EXPECT_EQ(E8M0{255}.ToBf16().bits, 0x7fc0);
  EXPECT_TRUE(E8M0{255}.IsNan());
  EXPECT_TRUE(std::isnan(E8M0{255}.ToFloat()));
}

// Packed scales have every E4M3 number that is not negative.
TEST(UE5M3Test, HoldsE4M3) {
  for (int byte = 0; byte < 0x7f; ++byte) {
    const E4M3 scale{static_cast<uint8_t>(byte)};
    const auto packed = ExactScale<UE5M3>(scale.ToFloat());
    EXPECT_EQ(packed.ToFloat(), scale.ToFloat()) << byte;
    EXPECT_EQ(ExactScale<E4M3>(packed.ToFloat()).bits, byte);
    EXPECT_EQ(ExactScale<E4M3>(-scale.ToFloat()).bits, byte | 0x80);
  }
  EXPECT_TRUE(ExactScale<E4M3>(NAN).IsNan());
}

TEST(UE5M3Test, AllBytesInUse) {
  EXPECT_EQ(UE5M3{0}.ToFloat(), 0.0f);
  for (int byte = 8; byte <= 0xff; ++byte) {
    const float expected = std::ldexp(1.0f + static_cast<float>(byte & 7) / 8, (byte >> 3) - 15);
    EXPECT_EQ(UE5M3{static_cast<uint8_t>(byte)}.ToFloat(), expected) << byte;
  }
}

TEST(DTypeTest, Sizes) {
  EXPECT_EQ(ByteSize(DType::kBf16), 2);
  EXPECT_EQ(ByteSize(DType::kFp16), 2);
  EXPECT_EQ(ByteSize(DType::kFp32), 4);
}

}  // namespace
}  // namespace cpumoe
