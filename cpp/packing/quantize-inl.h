// Staged activations of the int8 path: a block of tokens as quad_gemm-inl.h reads it (QuadBlock).
//
// A token's group of k is rounded to q = round(x * 127 / max|x|), which is worth q * max|x| / 127.
// A group that holds an infinity or NaN becomes NaN as a whole.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/float_types.h"
#include "kernels/quad_gemm-inl.h"
#include "kernels/tile.h"

namespace cpumoe {

template <class Codec>
class QuadStage {
  static constexpr int kGroupSize = Codec::Format::kGroupSize;

 public:
  // `block` is the memory of `tokens` tokens of `columns` activations.
  QuadStage(std::byte* block, int tokens, int64_t columns) : tokens_(tokens) {
    const QuadBlock at = QuadBlock::At(block, tokens, columns, kGroupSize);
    quads_ = const_cast<int8_t*>(at.quads);
    scales_ = const_cast<float*>(at.scales);
    starts_ = const_cast<int32_t*>(at.starts);
  }

  static constexpr int kPlanes = 3;

  // Row x [columns] of the block's token `t`.
  template <class Element>
  void Row(const Element* x, int t, int64_t columns) const {
    ForGroups(x, columns, [&](const float* values, int64_t group) { Group(values, t, group); });
  }

  // The same as exact sums of the kPlanes tokens from `t` on.
  template <class Element>
  void RowInPlanes(const Element* x, int t, int64_t columns) const {
    ForGroups(x, columns,
              [&](const float* values, int64_t group) { GroupInPlanes(values, t, group); });
  }

  // One group of token `t`.
  void Group(const float* x, int t, int64_t group) const {
    int32_t rounded[kGroupSize] = {};
    const float greatest = Greatest(x);
    float scale = greatest / kMaxQuadValue;
    if (greatest >= kLeast && IsFinite(greatest)) {
      Round(x, kMaxQuadValue / greatest, rounded);
    } else {
      scale = greatest < kLeast ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    Store(rounded, scale, t, group);
  }

  // One group of the tokens from `t` on, each of which holds what the ones before leave. An
  // infinity is one times an infinite scale; with two of them, or a NaN, the group is NaN as a
  // whole.
  void GroupInPlanes(const float* x, int t, int64_t group) const {
    int32_t rounded[kGroupSize] = {};
    float rest[kGroupSize];
    std::copy_n(x, kGroupSize, rest);
    const float greatest = Greatest(x);
    float scale = greatest / kMaxQuadValue;
    if (!IsFinite(greatest)) {
      int infinities = 0;
      for (int i = 0; i < kGroupSize; ++i) {
        rounded[i] = std::isinf(x[i]) ? (x[i] < 0 ? -1 : 1) : 0;
        infinities += rounded[i] != 0 ? 1 : 0;
      }
      Store(rounded, infinities == 1 ? greatest : std::numeric_limits<float>::quiet_NaN(), t,
            group);
      std::fill_n(rounded, kGroupSize, 0);
      for (int p = 1; p < kPlanes; ++p) Store(rounded, 0.0f, t + p, group);
      return;
    }
    for (int p = 0; p < kPlanes; ++p) {
      if (greatest >= kLeast) {
        Round(rest, 1.0f / scale, rounded);
        for (int i = 0; i < kGroupSize; ++i) {
          rest[i] = std::fma(-static_cast<float>(rounded[i]), scale, rest[i]);
        }
      }
      Store(rounded, greatest >= kLeast ? scale : 0.0f, t + p, group);
      scale /= 2 * kMaxQuadValue;
    }
  }

 private:
  // Below this, 127 / greatest would overflow, or a plane's scale underflow; such a group counts as
  // zero.
  static constexpr float kLeast = 0x1p-100f;

  static float ToFloat(float x) { return x; }
  template <class Element>
  static float ToFloat(Element x) {
    return x.ToFloat();
  }
  template <class Element, class Body>
  static void ForGroups(const Element* x, int64_t columns, Body&& body) {
    for (int64_t group = 0; group < columns / kGroupSize; ++group) {
      float values[kGroupSize];
      for (int i = 0; i < kGroupSize; ++i) values[i] = ToFloat(x[group * kGroupSize + i]);
      body(values, group);
    }
  }
  // Magnitudes compare as integers do, NaN as the greatest; compilers vectorise that.
  static float Greatest(const float* x) {
    uint32_t most = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    }
    return std::bit_cast<float>(most);
  }
  static bool IsFinite(float magnitude) { return magnitude <= std::numeric_limits<float>::max(); }

  // rounded = x * inverse, to nearest.
  static void Round(const float* x, float inverse, int32_t* rounded) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    constexpr float kMagic = 12582912.0f;
    for (int i = 0; i < kGroupSize; ++i) {
      rounded[i] = std::bit_cast<int32_t>(x[i] * inverse + kMagic) - std::bit_cast<int32_t>(kMagic);
    }
  }

  void Store(const int32_t* rounded, float scale, int t, int64_t group) const {
    int32_t sum = 0;
    for (int i = 0; i < kGroupSize; ++i) sum += rounded[i];
    int8_t* out = quads_ + (group * kGroupSize * tokens_ + t * kQuadDepth);
    for (int k = 0; k < kGroupSize; k += kQuadDepth, out += kQuadDepth * tokens_) {
      for (int i = 0; i < kQuadDepth; ++i) {
        out[i] = static_cast<int8_t>(rounded[k + kQuadOrder[i]]);
      }
    }
    scales_[group * tokens_ + t] = scale * Codec::kUnit;
    starts_[group * tokens_ + t] = -Codec::kOffset * sum;
  }

  int tokens_;
  int8_t* quads_;
  float* scales_;
  int32_t* starts_;
};

}  // namespace cpumoe
