// Symmetric INT4: a code is its value + 8, and 32 codes, a multiple of 32, or a row share one bf16
// scale (compressed-tensors "pack-quantized").
//
// The routed experts of Kimi-K2 have this format, with one scale per 32 codes.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/float_types.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Int4 {
  using Scale = Bf16;
  static constexpr std::string_view kName = "int4";
  static constexpr int kCodeBits = 4;
  static constexpr int kScaleDepth = 32;
  static constexpr float kMinMagnitude = 1.0f;
  static constexpr float kMaxMagnitude = 8.0f;
  static constexpr float kUnit = 1.0f;

  static constexpr std::array<float, 16> kCodeValues = {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f,
                                                        -2.0f, -1.0f, 0.0f,  1.0f,  2.0f,  3.0f,
                                                        4.0f,  5.0f,  6.0f,  7.0f};

  static float Decode(uint32_t code) { return kCodeValues[code]; }
  static bool AllowsScaleDepth(int64_t depth) { return depth > 0 && depth % kScaleDepth == 0; }
  static bool IsValidScale(Scale scale) { return std::isfinite(scale.ToFloat()); }
};

static_assert(WeightFormat<Int4>);

}  // namespace cpumoe
