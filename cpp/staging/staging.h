// Staging: how activations become what kernels read. A variant library instantiates it once per
// ISA, for all formats (staging-inl.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/float_types.h"
#include "kernels/isa.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

// For the floating point path. Blocks have the layout of stage-inl.h.
template <class Isa>
struct FloatStaging {
  using Activation = typename Isa::Activation;

  // block = rows token[0..tokens) of x [*, columns], whose rows are row_stride elements apart.
  static void Rows(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                   const int32_t* token, int tokens, int64_t columns, Activation* block);
  // Writes the features of a tile, h [kTileRows], to token t of the block, from feature `first` on.
  static void Features(StagedForm form, const float* h, int64_t first, int t, int tokens,
                       Activation* block);
};

template <>
struct FloatStaging<NoWideIsa> {};

// How a format's bytes are related to its weights: weight = (byte - offset) * unit.
struct ByteWeights {
  int offset;
  float unit;
};

// The unit of a group of digits is at least so large. Its product with a format's unit must be a
// number.
inline constexpr float kLeastDigitUnit = 0x1p-148f;

// For the byte paths: digits (digits-inl.h) and int8 (quantize-inl.h). Arguments are those of
// FloatStaging. `dtype` is the element type of the call, and h has a group of features.
template <class Isa>
struct ByteStaging {
  static void DigitRows(const ByteWeights& weights, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block);
  static void DigitFeatures(const ByteWeights& weights, DType dtype, const float* h, int64_t first,
                            int t, int tokens, std::byte* block);
  static void QuadRows(const ByteWeights& weights, DType dtype, const void* x, int64_t row_stride,
                       const int32_t* token, int tokens, int64_t columns, std::byte* block);
  static void QuadFeatures(const ByteWeights& weights, const float* h, int64_t first, int t,
                           int tokens, int64_t columns, std::byte* block);
};

}  // namespace cpumoe
