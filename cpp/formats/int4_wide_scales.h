// Symmetric INT4 whose scales are fp16 or fp32, beside bf16. They are packed as fp32, which has all
// three.
//
// Hosts know this format as int4, too: the type of a layer's scales chooses between the two.
#pragma once

#include <cmath>

#include "base/float_types.h"
#include "formats/int4.h"
#include "formats/weight_format.h"

namespace cpumoe {

struct Int4WideScales : Int4 {
  using Scale = Fp32;

  static constexpr bool AllowsScaleType(ScaleType type) {
    return type == ScaleType::kOwn || type == ScaleType::kBf16 || type == ScaleType::kFp16 ||
           type == ScaleType::kFp32;
  }
  static bool IsValidScale(Scale scale) { return std::isfinite(scale.value); }
};

static_assert(WeightFormat<Int4WideScales>);

}  // namespace cpumoe
