// Where the scales of a stored matrix are, and their type.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "base/float_types.h"

namespace cpumoe {

// The type of stored scales. Checkpoints of one format may differ in it.
enum class ScaleType : int32_t {
  kOwn = 0,  // the format's own type
  kE8M0 = 1,
  kBf16 = 2,
  kFp32 = 3,
  kE4M3 = 4,
  kFp16 = 5,
};
inline constexpr int kScaleTypes = 6;

constexpr const char* ScaleTypeName(ScaleType type) {
  constexpr const char* kNames[kScaleTypes] = {
      "the format's own", "E8M0", "bf16", "fp32", "E4M3", "fp16"};
  return kNames[static_cast<int32_t>(type)];
}

// The names of a set of types: bit t stands for type t.
inline std::string ScaleTypeNames(uint32_t types) {
  std::string names;
  for (int32_t type = 1; type < kScaleTypes; ++type) {
    if ((types >> type & 1) == 0) continue;
    names +=
        (names.empty() ? "" : " or ") + std::string(ScaleTypeName(static_cast<ScaleType>(type)));
  }
  return names;
}

// A scale belongs to a block of `rows` rows and `depth` successive k. The last blocks of a matrix
// may be smaller.
struct ScaleGrid {
  int64_t rows = 1;
  int64_t depth = 32;
  ScaleType type = ScaleType::kOwn;
};

// What a stored matrix has besides codes and scales.
struct StoredScales {
  ScaleGrid grid;
  float factor = 1.0f;  // multiplies all weights of the matrix
};

template <class Scale>
constexpr ScaleType TypeOfScale() {
  if constexpr (std::same_as<Scale, E8M0>) return ScaleType::kE8M0;
  if constexpr (std::same_as<Scale, Bf16>) return ScaleType::kBf16;
  if constexpr (std::same_as<Scale, Fp32>) return ScaleType::kFp32;
  if constexpr (std::same_as<Scale, E4M3>) return ScaleType::kE4M3;
  if constexpr (std::same_as<Scale, Fp16>) return ScaleType::kFp16;
  return ScaleType::kOwn;
}

// Calls visitor(Scale{}) with the type of scales.
template <class Own, class Visitor>
decltype(auto) VisitScaleType(ScaleType type, Visitor&& visitor) {
  switch (type) {
    case ScaleType::kE8M0:
      return visitor(E8M0{});
    case ScaleType::kBf16:
      return visitor(Bf16{});
    case ScaleType::kFp32:
      return visitor(Fp32{});
    case ScaleType::kE4M3:
      return visitor(E4M3{});
    case ScaleType::kFp16:
      return visitor(Fp16{});
    case ScaleType::kOwn:
      break;
  }
  return visitor(Own{});
}

template <class Scale>
Scale LoadScale(const std::byte* from) {
  Scale scale;
  std::memcpy(&scale, from, sizeof(scale));
  return scale;
}

// Whether every scale of type `from` is a number of type `to`.
constexpr bool HoldsScales(ScaleType from, ScaleType to) {
  return from == to || to == ScaleType::kFp32 ||
         (from == ScaleType::kE8M0 && to == ScaleType::kBf16);
}

// Converts a scale to type To, which must have this number. A NaN stays one.
template <class To>
To ExactScale(float scale) {
  const uint32_t bits = std::bit_cast<uint32_t>(scale);
  if constexpr (std::same_as<To, Fp32>) return {scale};
  if constexpr (std::same_as<To, Bf16>) return {static_cast<uint16_t>(bits >> 16)};
  if constexpr (std::same_as<To, E8M0>) return {static_cast<uint8_t>(bits >> 23)};
  if constexpr (std::same_as<To, UE5M3>) {
    return {static_cast<uint8_t>(scale == 0.0f ? 0 : (bits >> 20) - (112 << 3))};
  }
  [[maybe_unused]] const uint32_t magnitude = bits & 0x7fffffffu;
  if constexpr (std::same_as<To, E4M3>) {
    const auto code = magnitude >= std::bit_cast<uint32_t>(0x1p-6f)
                          ? (magnitude >> 20) - (120 << 3)
                          : static_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p9f);
    return {static_cast<uint8_t>((bits >> 31 << 7) | std::min(code, 0x7fu))};
  }
  if constexpr (std::same_as<To, Fp16>) {
    const auto code = magnitude >= std::bit_cast<uint32_t>(0x1p-14f)
                          ? (magnitude >> 13) - (112 << 10)
                          : static_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p24f);
    return {static_cast<uint16_t>((bits >> 31 << 15) | std::min(code, 0x7fffu))};
  }
}

}  // namespace cpumoe
