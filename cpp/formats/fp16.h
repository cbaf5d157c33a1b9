// fp16 as published: the weights are IEEE binary16 numbers, without scales.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/float_types.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Fp16Weights {
  using Scale = NoScale;
  static constexpr std::string_view kName = "fp16";
  static constexpr int kCodeBits = 16;
  static constexpr uint16_t kNotFinite = 0x7c00;

  static float Decode(uint32_t code) { return Fp16{static_cast<uint16_t>(code)}.ToFloat(); }
};

static_assert(WeightFormat<Fp16Weights>);

}  // namespace cpumoe
