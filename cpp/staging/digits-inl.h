// Staged activations of the digit path: a block holds DigitGroups, [group][token].
//
// Let 2^e be the least power of two above all magnitudes of a group.
//
// A group has no outlier if its other magnitudes together are at least twice its greatest. Such a
// group is rounded to multiples of 2^(e-13), two digits. No activation is off by more than 2^-13 of
// the greatest. In groups of 32 that is 2^-9 of the others' mean, as much as rounding the mean to
// bf16 may cost.
//
// A group with an outlier is rounded to multiples of 2^(e-20), three digits. There a bf16 number is
// exact unless the greatest is over 2^12 times as large. If the host's elements are more precise
// than bf16, all groups have three digits.
//
// No multiple is below 2^-148, the least unit whose product with a format's kUnit is still a
// number.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/float_types.h"
#include "kernels/digit_gemm-inl.h"
#include "kernels/tile.h"
#include "staging/round_group-inl.h"
#include "staging/staging.h"

namespace cpumoe {

class DigitStage {
 public:
  // `dtype` is the element type of the call.
  DigitStage(const ByteWeights& weights, DType dtype)
      : weights_(weights), may_have_few_(dtype == DType::kBf16) {}

  // Writes a row of `columns` activations of any element type. The row's groups are `stride` apart.
  template <class Element>
  void Row(const Element* x, int64_t columns, DigitGroup* out, int64_t stride) const {
    ForGroups(x, columns,
              [=, this](const float* values, int64_t g) { Write(values, out[g * stride]); });
  }

  // Writes one group. A lone infinity is one times an infinite scale. With two infinities or a NaN,
  // the whole group is NaN.
  void Write(const float* x, DigitGroup& out) const {
    const float greatest = GreatestMagnitude(x);
    if (!IsFinite(greatest)) return WriteNotFinite(x, out);
    if (greatest < kLeast) return WriteTiny(x, greatest, out);
    int32_t integers[kGroupSize];
    if (may_have_few_) {
      const float unit = Unit(greatest, kFewDigits);
      RoundToIntegers(x, 1.0f / unit, integers);
      if (!HasOutlier(integers)) return WriteDigits<kFewDigits>(integers, unit, out);
    }
    const float unit = Unit(greatest, kMostDigits);
    RoundToIntegers(x, 1.0f / unit, integers);
    WriteDigits<kMostDigits>(integers, unit, out);
  }

 private:
  // The unit is 2^-20 of the greatest magnitude. Below kLeast the unit may be subnormal, and one
  // over it infinite.
  static constexpr float kLeast = 0x1p-106f;

  // Returns the value of the integer 1 in a group with this greatest magnitude, which is 2^-106 or
  // more.
  static float Unit(float greatest, int digits) {
    // The power of two with the exponent of `greatest`. The least power above `greatest` is twice
    // that.
    const float power = std::bit_cast<float>(std::bit_cast<uint32_t>(greatest) & 0x7f800000u);
    return power * (2.0f / (1 << IntegerBits(digits)));
  }

  // Writes a group below kLeast: multiplies it by a power of two before rounding.
  void WriteTiny(const float* x, float greatest, DigitGroup& out) const {
    if (greatest == 0) {
      out = {.digits = {}, .scale = 0, .start = 0, .count = kFewDigits};
      return;
    }
    constexpr float kLift = 0x1p64f;
    float lifted[kGroupSize];
    for (int i = 0; i < kGroupSize; ++i) lifted[i] = x[i] * kLift;
    const float unit = std::max(Unit(greatest * kLift, kMostDigits), kLeastDigitUnit * kLift);
    int32_t integers[kGroupSize];
    RoundToIntegers(lifted, 1.0f / unit, integers);
    WriteDigits<kMostDigits>(integers, unit / kLift, out);
  }

  // Whether the other integers together are less than twice the greatest.
  static bool HasOutlier(const int32_t* integers) {
    int32_t sum = 0, greatest = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      const int32_t magnitude = integers[i] < 0 ? -integers[i] : integers[i];
      sum += magnitude;
      greatest = std::max(greatest, magnitude);
    }
    return sum - greatest < 2 * greatest;
  }

  void WriteNotFinite(const float* x, DigitGroup& out) const {
    int32_t integers[kGroupSize];
    int infinities = 0;
    bool nan = false;
    for (int i = 0; i < kGroupSize; ++i) {
      integers[i] = std::isinf(x[i]) ? (x[i] < 0 ? -1 : 1) : 0;
      infinities += integers[i] != 0 ? 1 : 0;
      nan = nan || std::isnan(x[i]);
    }
    const bool lone = infinities == 1 && !nan;
    WriteDigits<kFewDigits>(
        integers,
        lone ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN(),
        out);
  }

  template <int kDigits>
  void WriteDigits(const int32_t* integers, float unit, DigitGroup& out) const {
    int32_t sum = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      sum += integers[i];
      int32_t rest = integers[InQuadOrder(i)];
      for (int p = kDigits - 1; p > 0; --p) {
        constexpr int kHalf = 1 << (kDigitBits - 1);
        const int32_t digit = ((rest + kHalf) & (2 * kHalf - 1)) - kHalf;
        out.digits[p][i] = static_cast<int8_t>(digit);
        rest = (rest - digit) >> kDigitBits;
      }
      out.digits[0][i] = static_cast<int8_t>(rest);
    }
    out.scale = unit * weights_.unit;
    out.start = -weights_.offset * sum;
    out.count = kDigits;
  }

  ByteWeights weights_;
  bool may_have_few_;
};

}  // namespace cpumoe
