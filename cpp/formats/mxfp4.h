// MXFP4: E2M1 codes, 32 of which share one E8M0 scale (OCP Microscaling Formats 1.0, sections 5.3.3
// and 5.4.1).
//
// The routed experts of DeepSeek-V4-Flash and gpt-oss have this format.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "base/float_types.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Mxfp4 {
  using Scale = E8M0;
  static constexpr std::string_view kName = "mxfp4";
  static constexpr int kCodeBits = 4;
  static constexpr int kScaleDepth = 32;
  static constexpr float kMinMagnitude = 0.5f;
  static constexpr float kMaxMagnitude = 6.0f;
  static constexpr float kUnit = 0.5f;
  static constexpr std::array<float, 16> kCodeValues = {
      0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,  //
      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

  static float Decode(uint32_t code) { return kCodeValues[code]; }
  static bool AllowsScaleDepth(int64_t depth) { return depth == kScaleDepth; }
  static bool IsValidScale(Scale scale) { return !scale.IsNan(); }
};

static_assert(WeightFormat<Mxfp4>);

}  // namespace cpumoe
