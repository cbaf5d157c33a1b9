// bf16 as published: the weights are bf16 numbers, without scales.
//
// Most models are published so, for example Qwen3-MoE and Mixtral.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/float_types.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Bf16Weights {
  using Scale = NoScale;
  static constexpr std::string_view kName = "bf16";
  static constexpr int kCodeBits = 16;
  static constexpr uint16_t kNotFinite = 0x7f80;

  static float Decode(uint32_t code) { return Bf16{static_cast<uint16_t>(code)}.ToFloat(); }
};

static_assert(WeightFormat<Bf16Weights>);

}  // namespace cpumoe
