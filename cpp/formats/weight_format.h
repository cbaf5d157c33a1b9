// A weight format: how a checkpoint stores an [N, K] matrix. Nothing here depends on a CPU.
//
// A matrix has N rows. A row has K codes, packed along K (low bits of a byte first). A scale
// belongs to a block of rows and successive k (scale_grid.h). A weight is Decode(code) * scale. In
// a format without scales, a weight is Decode(code).
//
// A format may say more:
//
//   kPackedDepth           successive k whose sum kernels scale at once; default: 32
//   AllowsScaleRows(n)     whether n rows may share their scales; default: only one
//   AllowsScaleType(type)  whether scales may be stored in this type; default: only as Scale
//   kNotFinite             the least magnitude of codes that are NaN or infinite, which packing
//                          refuses; default: all codes are numbers
//   PackedScale            the type of packed scales, which has all valid ones; default: Scale
//   kHasFactor             whether a matrix may have a factor, which multiplies all its weights;
//                          default: false
//   kLeastScale, kGreatestScale
//                          the least and greatest scale that is not zero. If the products of all
//                          scales and codes are exact multiplicands on an ISA, kernels need not be
//                          able to apply scales to the sums of its panels.
//
// Packed tiles have a scale for each row and kPackedDepth successive k. Stored scales of any type
// may become packed scales of type Fp32.
//
// Several classes may have one kName. Hosts know them as one format, and the type of a layer's
// scales chooses the first class that takes it.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "base/float_types.h"
#include "formats/scale_grid.h"

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

// Whether a matrix of `columns` columns may have such scales. A whole row may share a scale if so
// many weights may.
template <ScaledFormat F>
constexpr bool AllowsScaleDepth(int64_t depth, int64_t columns) {
  constexpr int64_t kPacked = kPackedDepthOf<F>;
  return F::AllowsScaleDepth(depth) ||
         (depth == columns && F::AllowsScaleDepth((columns + kPacked - 1) / kPacked * kPacked));
}
template <ScaledFormat F>
constexpr bool AllowsScaleRows(int64_t rows) {
  if constexpr (requires { F::AllowsScaleRows(rows); }) return F::AllowsScaleRows(rows);
  return rows == 1;
}
template <ScaledFormat F>
constexpr bool AllowsScaleType(ScaleType type) {
  if constexpr (requires { F::AllowsScaleType(type); }) return F::AllowsScaleType(type);
  return type == ScaleType::kOwn || type == TypeOfScale<typename F::Scale>();
}

// The code of zero. Codes without a table are floating point numbers.
template <WeightFormat F>
constexpr uint32_t ZeroCodeOf() {
  uint32_t code = 0;
  if constexpr (requires { F::kCodeValues; }) {
    while (F::kCodeValues[code] != 0.0f) ++code;
  }
  return code;
}

// Throws std::invalid_argument unless rows of so many codes are whole bytes. `format` and `what`
// are names.
inline void RequireWholeBytes(const char* format, int code_bits, int64_t codes, const char* what) {
  const int64_t per_byte = code_bits < 8 ? 8 / code_bits : 1;
  Require(codes % per_byte == 0, format, ": ", what, " must be a multiple of ", per_byte,
          ", because a byte has ", per_byte, " codes, got ", codes);
}
template <WeightFormat F>
void RequireWholeBytes(int64_t codes, const char* what) {
  RequireWholeBytes(F::kName.data(), F::kCodeBits, codes, what);
}

template <class F>
inline constexpr bool kHasFactorOf = false;
template <class F>
  requires requires { F::kHasFactor; }
inline constexpr bool kHasFactorOf<F> = F::kHasFactor;

// The types of stored scales that a format takes: bit t stands for type t.
template <WeightFormat F>
constexpr uint32_t ScaleTypesOf() {
  uint32_t types = 1u << static_cast<int32_t>(ScaleType::kOwn);
  if constexpr (HasScales<F>) {
    for (int32_t type = 0; type < kScaleTypes; ++type) {
      if (AllowsScaleType<F>(static_cast<ScaleType>(type))) types |= 1u << type;
    }
  }
  return types;
}

// The properties of a format that hosts need at run time.
struct FormatInfo {
  const char* name;
  int code_bits;
  int scale_depth;  // the usual number of successive k that share a scale; 0: there are no scales
  int scale_bytes;  // of one scale of the format's own type
  uint32_t scale_types;  // ScaleTypesOf

  constexpr bool TakesScales(ScaleType type) const {
    return (scale_types >> static_cast<int32_t>(type) & 1) != 0;
  }
};

template <WeightFormat F>
constexpr FormatInfo InfoOf() {
  if constexpr (HasScales<F>) {
    return {F::kName.data(), F::kCodeBits, F::kScaleDepth, kBytesOfScale<typename F::Scale>,
            ScaleTypesOf<F>()};
  } else {
    return {F::kName.data(), F::kCodeBits, 0, 0, ScaleTypesOf<F>()};
  }
}

}  // namespace cpumoe
