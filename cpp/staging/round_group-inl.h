// Rounds groups of activations to integers, in loops that compilers vectorise.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "base/float_types.h"
#include "kernels/tile.h"

namespace cpumoe {

inline float ToFloat(float x) { return x; }
template <class Element>
float ToFloat(Element x) {
  return x.ToFloat();
}

// Calls body(values, group) for each group of kGroupSize elements of x [columns]. If the last group
// has fewer elements, zeros follow.
template <class Element, class Body>
void ForGroups(const Element* x, int64_t columns, Body&& body) {
  for (int64_t group = 0; group < GroupsOf(columns); ++group) {
    float values[kGroupSize];
    const Element* in = x + group * kGroupSize;
    const int64_t rest = columns - group * kGroupSize;
    if (rest >= kGroupSize) {
      for (int i = 0; i < kGroupSize; ++i) values[i] = ToFloat(in[i]);
    } else {
      for (int i = 0; i < kGroupSize; ++i) values[i] = i < rest ? ToFloat(in[i]) : 0.0f;
    }
    body(values, group);
  }
}

// Returns the greatest magnitude. The bits of magnitudes compare like integers, with NaN as the
// greatest.
inline float GreatestMagnitude(const float* x) {
  uint32_t most = 0;
  for (int i = 0; i < kGroupSize; ++i) {
    most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  }
  return std::bit_cast<float>(most);
}

inline bool IsFinite(float magnitude) { return magnitude <= std::numeric_limits<float>::max(); }

// rounded = x * factor, rounded to nearest. Results have magnitudes up to 2^22.
inline void RoundToIntegers(const float* x, float factor, int32_t* rounded) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kMagic = 12582912.0f;
  for (int i = 0; i < kGroupSize; ++i) {
    rounded[i] = std::bit_cast<int32_t>(x[i] * factor + kMagic) - std::bit_cast<int32_t>(kMagic);
  }
}

}  // namespace cpumoe
