// NVFP4: E2M1 codes, 16 of which share one E4M3 scale. A matrix has one more factor, in fp32.
//
// ModelOpt and compressed-tensors ("nvfp4-pack-quantized") publish models so. A scale is the
// quotient of a group's greatest magnitude and the factor, so that no scale is negative.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "base/float_types.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Nvfp4 {
  using Scale = E4M3;
  using PackedScale = UE5M3;
  static constexpr std::string_view kName = "nvfp4";
  static constexpr int kCodeBits = 4;
  static constexpr int kScaleDepth = 16;
  static constexpr int kPackedDepth = 16;
  static constexpr bool kHasFactor = true;
  static constexpr float kMinMagnitude = 0.5f;
  static constexpr float kMaxMagnitude = 6.0f;
  static constexpr float kLeastScale = 0x1p-9f;
  static constexpr float kGreatestScale = 448.0f;
  static constexpr std::array<float, 16> kCodeValues = {
      0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,  //
      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

  static float Decode(uint32_t code) { return kCodeValues[code]; }
  static constexpr bool AllowsScaleDepth(int64_t depth) { return depth == kScaleDepth; }
  static constexpr bool IsValidScale(Scale scale) { return scale.bits < 0x7f; }
};

static_assert(WeightFormat<Nvfp4>);

}  // namespace cpumoe
