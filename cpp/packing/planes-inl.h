// Staged activations of the planes path: a token's groups follow each other (PlaneGroup).
//
// A group is rounded to multiples of 2^(e-20), where 2^e is the least power of two above all of its
// magnitudes. So a bf16 number is exact unless the group's greatest is over 2^12 times as large,
// and none is off by more than 2^-20 of that.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/plane_gemm-inl.h"
#include "kernels/tile.h"
#include "packing/round_group-inl.h"

namespace cpumoe {

template <class Codec>
class PlaneStage {
  static constexpr int kGroupSize = Codec::Format::kGroupSize;

 public:
  using Group = PlaneGroup<kGroupSize>;

  // A row of activations, `columns` of any element type.
  template <class Element>
  static void Row(const Element* x, int64_t columns, Group* out) {
    ForGroups<kGroupSize>(x, columns,
                          [out](const float* values, int64_t g) { Write(values, out[g]); });
  }

  // An infinity is one times an infinite scale; with two of them, or a NaN, the group is NaN as a
  // whole.
  static void Write(const float* x, Group& out) {
    const float greatest = GreatestMagnitude<kGroupSize>(x);
    if (!IsFinite(greatest)) return WriteNotFinite(x, out);
    if (greatest < kLeast) {
      out = {};
      return;
    }
    // The power of two of `greatest`'s exponent; the least one above is twice that.
    const float power = std::bit_cast<float>(std::bit_cast<uint32_t>(greatest) & 0x7f800000u);
    const float unit = power * (2.0f / (1 << kPlaneBits));
    int32_t integers[kGroupSize];
    RoundToIntegers<kGroupSize>(x, 1.0f / unit, integers);
    WriteDigits(integers, unit, out);
  }

 private:
  // Below this the scale, which is 2^-20 of it, might be subnormal; the group counts as zero.
  static constexpr float kLeast = 0x1p-106f;

  static void WriteNotFinite(const float* x, Group& out) {
    int32_t integers[kGroupSize];
    int infinities = 0;
    bool nan = false;
    for (int i = 0; i < kGroupSize; ++i) {
      integers[i] = std::isinf(x[i]) ? (x[i] < 0 ? -1 : 1) : 0;
      infinities += integers[i] != 0 ? 1 : 0;
      nan = nan || std::isnan(x[i]);
    }
    const bool lone = infinities == 1 && !nan;
    WriteDigits(
        integers,
        lone ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN(),
        out);
  }

  static void WriteDigits(const int32_t* integers, float unit, Group& out) {
    int32_t sum = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      sum += integers[i];
      int32_t rest = integers[i / kQuadDepth * kQuadDepth + kQuadOrder[i % kQuadDepth]];
      for (int p = kPlanes - 1; p > 0; --p) {
        constexpr int kHalf = 1 << (kDigitBits - 1);
        const int32_t digit = ((rest + kHalf) & (2 * kHalf - 1)) - kHalf;
        out.digits[p][i] = static_cast<int8_t>(digit);
        rest = (rest - digit) >> kDigitBits;
      }
      out.digits[0][i] = static_cast<int8_t>(rest);
    }
    out.scale = unit * Codec::kUnit;
    out.start = -Codec::kOffset * sum;
  }
};

}  // namespace cpumoe
