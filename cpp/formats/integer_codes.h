// Formats whose sixteen codes are integers times one unit. The byte paths (digits, int8) multiply
// such codes as bytes.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>

#include "formats/weight_format.h"

namespace cpumoe {

// Every F::Decode(code) is F::kUnit times an integer of at most 7 bits.
template <class F>
concept HasIntegerCodes = WeightFormat<F> && F::kCodeBits == 4 && requires {
  { F::kUnit } -> std::convertible_to<float>;
};

// A format's codes as unsigned bytes: Decode(code) = (kBytes[code] - kOffset) * F::kUnit.
template <HasIntegerCodes F>
struct IntegerCodes {
  static constexpr int Integer(uint32_t code) {
    return static_cast<int>(F::kCodeValues[code] / F::kUnit);
  }
  static constexpr int kOffset = [] {
    int least = 0;
    for (uint32_t code = 0; code < 16; ++code) {
      if (Integer(code) < least) least = Integer(code);
    }
    return -least;
  }();
  static constexpr std::array<uint8_t, 16> kBytes = [] {
    std::array<uint8_t, 16> bytes{};
    for (uint32_t code = 0; code < 16; ++code) {
      bytes[code] = static_cast<uint8_t>(Integer(code) + kOffset);
    }
    return bytes;
  }();
  static constexpr int kGreatest = [] {
    int greatest = 0;
    for (const uint8_t byte : kBytes) greatest = byte > greatest ? byte : greatest;
    return greatest;
  }();
  static_assert([] {
    for (uint32_t code = 0; code < 16; ++code) {
      if (Integer(code) * F::kUnit != F::kCodeValues[code]) return false;
    }
    return kGreatest < 128;
  }());
};

}  // namespace cpumoe
