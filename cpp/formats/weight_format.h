// A weight format: how a checkpoint stores an [N, K] matrix. Nothing here depends on a CPU.
//
// A matrix has N rows. A row has K codes, packed along K (low bits of a byte first), and K /
// kGroupSize scales. A weight is Decode(code) * scale.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "base/float_types.h"

namespace cpumoe {

template <class F>
concept WeightFormat = requires(typename F::Scale scale) {
  { F::kName } -> std::convertible_to<std::string_view>;
  { F::kCodeBits } -> std::convertible_to<int>;      // bits of a code, a divisor of 32
  { F::kGroupSize } -> std::convertible_to<int>;     // successive k that share a scale
  { F::Decode(uint32_t{}) } -> std::same_as<float>;  // a code's value before scaling, exact in bf16
  { F::kMinMagnitude } -> std::convertible_to<float>;  // least and greatest non-zero |Decode(code)|
  { F::kMaxMagnitude } -> std::convertible_to<float>;
  { F::IsValidScale(scale) } -> std::same_as<bool>;  // if false, the checkpoint is refused
  { scale.ToFloat() } -> std::same_as<float>;
};

// Whether scales are bf16 numbers, or become such numbers exactly.
template <class F>
concept HasBf16Scales =
    WeightFormat<F> && (std::same_as<typename F::Scale, Bf16> || requires(typename F::Scale scale) {
      { scale.ToBf16() } -> std::same_as<Bf16>;
    });

// The properties of a format that hosts need at run time.
struct FormatInfo {
  const char* name;
  int code_bits;
  int group_size;
  int scale_bytes;
};

template <WeightFormat F>
constexpr FormatInfo InfoOf() {
  return {F::kName.data(), F::kCodeBits, F::kGroupSize, sizeof(typename F::Scale)};
}

}  // namespace cpumoe
