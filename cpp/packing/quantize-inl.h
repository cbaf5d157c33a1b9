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

  // Row x [columns] of the block's token `t`.
  template <class Element>
  void Row(const Element* x, int t, int64_t columns) const {
    for (int64_t group = 0; group < columns / kGroupSize; ++group) {
      float values[kGroupSize];
      for (int i = 0; i < kGroupSize; ++i) values[i] = ToFloat(x[group * kGroupSize + i]);
      Group(values, t, group);
    }
  }

  // One group of token `t`.
  void Group(const float* x, int t, int64_t group) const {
    int32_t rounded[kGroupSize];
    const float greatest = Greatest(x);
    float scale = greatest / kMaxQuadValue;
    int32_t sum = 0;
    if (greatest >= kLeast && greatest <= std::numeric_limits<float>::max()) {
      const float inverse = kMaxQuadValue / greatest;
      // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
      constexpr float kMagic = 12582912.0f;
      for (int i = 0; i < kGroupSize; ++i) {
        rounded[i] =
            std::bit_cast<int32_t>(x[i] * inverse + kMagic) - std::bit_cast<int32_t>(kMagic);
        sum += rounded[i];
      }
    } else {
      std::fill_n(rounded, kGroupSize, 0);
      scale = greatest < kLeast ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    int8_t* out = quads_ + (group * kGroupSize * tokens_ + t * kQuadDepth);
    for (int k = 0; k < kGroupSize; k += kQuadDepth, out += kQuadDepth * tokens_) {
      for (int i = 0; i < kQuadDepth; ++i) {
        out[i] = static_cast<int8_t>(rounded[k + kQuadOrder[i]]);
      }
    }
    scales_[group * tokens_ + t] = scale * Codec::kUnit;
    starts_[group * tokens_ + t] = -Codec::kOffset * sum;
  }

 private:
  // Below this, 127 / greatest would overflow; such a group counts as zero.
  static constexpr float kLeast = 0x1p-100f;

  static float ToFloat(float x) { return x; }
  template <class Element>
  static float ToFloat(Element x) {
    return x.ToFloat();
  }
  // Magnitudes compare as integers do, NaN as the greatest; compilers vectorise that.
  static float Greatest(const float* x) {
    uint32_t most = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    }
    return std::bit_cast<float>(most);
  }

  int tokens_;
  int8_t* quads_;
  float* scales_;
  int32_t* starts_;
};

}  // namespace cpumoe
