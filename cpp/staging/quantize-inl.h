// Staged activations of the int8 path, in the layout that quad_gemm-inl.h reads (QuadBlock).
//
// Each group of k of a token is rounded to q = round(x * 127 / max|x|), and q stands for q * max|x|
// / 127. A group that holds an infinity or NaN becomes NaN as a whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/quad_gemm-inl.h"
#include "kernels/tile.h"
#include "staging/round_group-inl.h"
#include "staging/staging.h"

namespace cpumoe {

template <class Isa>
class QuadStage {
 public:
  // `block` is the memory for `tokens` tokens of `columns` activations each.
  QuadStage(const ByteWeights& weights, std::byte* block, int tokens, int64_t columns)
      : weights_(weights), tokens_(tokens) {
    const QuadBlock at = QuadBlock::At(block, tokens, PaddedColumns(columns), kGroupSize);
    quads_ = const_cast<int8_t*>(at.quads);
    scales_ = const_cast<float*>(at.scales);
    starts_ = const_cast<int32_t*>(at.starts);
  }

  // Writes row x [columns] as token `t` of the block.
  template <class Element>
  void Row(const Element* x, int t, int64_t columns) const {
    ForGroups(x, columns, [&](const float* values, int64_t group) { Group(values, t, group); });
  }

  // Writes one group of token `t`.
  void Group(const float* x, int t, int64_t group) const {
    int32_t rounded[kGroupSize] = {};
    const float greatest = GreatestMagnitude(x);
    float scale = greatest / kMaxQuadValue;
    if (greatest >= kLeast && IsFinite(greatest)) {
      RoundToIntegers(x, kMaxQuadValue / greatest, rounded);
    } else {
      scale = greatest < kLeast ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    Store(rounded, scale, t, group);
  }

 private:
  // If a group's greatest magnitude is below kLeast, 127 / greatest could overflow. Such a group
  // counts as zero.
  static constexpr float kLeast = 0x1p-100f;

  void Store(const int32_t* rounded, float scale, int t, int64_t group) const {
    int8_t quads[kGroupSize];
    for (int i = 0; i < kGroupSize; ++i) {
      quads[i] = static_cast<int8_t>(rounded[InQuadOrder(i)]);
    }
    int8_t* out = quads_ + (group * kGroupSize * tokens_ + t * kQuadDepth);
    for (int k = 0; k < kGroupSize; k += kQuadDepth, out += kQuadDepth * tokens_) {
      std::memcpy(out, quads + k, kQuadDepth);
    }
    scales_[group * tokens_ + t] = scale * weights_.unit;
    starts_[group * tokens_ + t] = StartOf<Isa>(weights_.offset, quads);
  }

  ByteWeights weights_;
  int tokens_;
  int8_t* quads_;
  float* scales_;
  int32_t* starts_;
};

}  // namespace cpumoe
