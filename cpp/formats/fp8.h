// FP8: E4M3 codes. A block of 128 x 128 weights, or a row, shares one scale.
//
// The routed experts of DeepSeek-V3 and many others are published so, with fp32, bf16 or E8M0
// scales.
#pragma once

#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/float_types.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Fp8 {
  using Scale = Fp32;
  static constexpr std::string_view kName = "fp8";
  static constexpr int kCodeBits = 8;
  static constexpr int kScaleDepth = 128;
  static constexpr int kPackedDepth = 128;
  static constexpr float kMinMagnitude = 0x1p-9f;
  static constexpr float kMaxMagnitude = 448.0f;
  static constexpr uint8_t kNotFinite = 0x7f;

  static float Decode(uint32_t code) { return E4M3{static_cast<uint8_t>(code)}.ToFloat(); }
  static bool AllowsScaleDepth(int64_t depth) { return depth > 0 && depth % kScaleDepth == 0; }
  static constexpr bool AllowsScaleRows(int64_t rows) { return rows == 1 || rows == kScaleDepth; }
  static constexpr bool AllowsScaleType(ScaleType) { return true; }
  static bool IsValidScale(Scale scale) { return std::isfinite(scale.value); }
};

static_assert(WeightFormat<Fp8>);

}  // namespace cpumoe
