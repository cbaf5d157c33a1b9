// A weight format: how a checkpoint stores an [N, K] matrix. Nothing here depends on a CPU.
//
// A matrix has N rows. A row has K codes, packed along K (low bits of a byte first), and a scale
// for each run of `depth` successive k. A weight is Decode(code) * scale. In a format without
// scales, a weight is Decode(code).
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "base/float_types.h"

namespace cpumoe {

// What a format with scales says about them.
template <class F>
concept ScaledFormat = HasScales<F> && requires(typename F::Scale scale) {
  { F::kScaleDepth } -> std::convertible_to<int>;  // the usual depth
  { F::AllowsScaleDepth(int64_t{}) } -> std::same_as<bool>;
  { F::kMinMagnitude } -> std::convertible_to<float>;  // least and greatest non-zero |Decode(code)|
  { F::kMaxMagnitude } -> std::convertible_to<float>;
  { F::IsValidScale(scale) } -> std::same_as<bool>;  // if false, the checkpoint is refused
  { scale.ToFloat() } -> std::same_as<float>;
};

template <class F>
concept WeightFormat = (!HasScales<F> || ScaledFormat<F>) && requires {
  { F::kName } -> std::convertible_to<std::string_view>;
  { F::kCodeBits } -> std::convertible_to<int>;      // bits of a code, a divisor of 32
  { F::Decode(uint32_t{}) } -> std::same_as<float>;  // a code's value before scaling
};

// Whether scales are bf16 numbers, or become such numbers exactly.
template <class F>
concept HasBf16Scales =
    HasScales<F> && (std::same_as<typename F::Scale, Bf16> || requires(typename F::Scale scale) {
      { scale.ToBf16() } -> std::same_as<Bf16>;
    });

// The properties of a format that hosts need at run time.
struct FormatInfo {
  const char* name;
  int code_bits;
  int scale_depth;  // the usual number of successive k that share a scale; 0: there are no scales
  int scale_bytes;  // of one scale
};

template <WeightFormat F>
constexpr FormatInfo InfoOf() {
  if constexpr (HasScales<F>) {
    return {F::kName.data(), F::kCodeBits, F::kScaleDepth, kBytesOfScale<typename F::Scale>};
  } else {
    return {F::kName.data(), F::kCodeBits, 0, 0};
  }
}

}  // namespace cpumoe
