// Staged activations of the floating point path: a block of tokens in the layout that the
// micro-kernels read.
//
//   [K/kStep][tokens][kStep] of Isa::Activation
//
// K is a whole number of groups. Zeros fill the last one.
//
// kStep is 2 for vector instructions: a token's pair (k, k+1) is one broadcast, and the pairs of
// all tokens of the block for one k follow one another in memory. The panel unit of an ISA may need
// another kStep.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/float_types.h"
#include "kernels/tile.h"

namespace cpumoe {

template <class Isa, class Element>
typename Isa::Activation ToActivation(Element value) {
  if constexpr (std::is_same_v<Element, typename Isa::Activation>) {
    return value;
  } else if constexpr (std::is_same_v<Element, float>) {
    return Isa::ToActivation(value);
  } else {
    return Isa::ToActivation(value.ToFloat());
  }
}

// The index of element k of token t in a block of `tokens` tokens.
template <int kStep>
int64_t StagedIndex(int64_t k, int t, int tokens) {
  return (k / kStep * tokens + t) * kStep + k % kStep;
}

// Gathers rows token[0..tokens) of x [*, columns] (row_stride elements apart) into `out`.
template <class Isa, int kStep, class Element>
void StageBlock(const Element* x, int64_t row_stride, const int32_t* token, int tokens,
                int64_t columns, typename Isa::Activation* out) {
  // Tokens share cache lines. Chunks keep a line in L1 until the last token has written to it.
  constexpr int64_t kChunk = 256;
  static_assert(kChunk % kStep == 0);
  const int64_t whole = columns / kGroupSize * kGroupSize;
  for (int64_t first = 0; first < whole; first += kChunk) {
    const int64_t end = std::min(first + kChunk, whole);
    for (int t = 0; t < tokens; ++t) {
      const Element* row = x + token[t] * row_stride;
      for (int64_t k = first; k < end; k += kStep) {
        typename Isa::Activation* step = out + StagedIndex<kStep>(k, t, tokens);
        for (int i = 0; i < kStep; ++i) step[i] = ToActivation<Isa>(row[k + i]);
      }
    }
  }
  for (int t = 0; t < tokens; ++t) {
    const Element* row = x + token[t] * row_stride;
    for (int64_t k = whole; k < PaddedColumns(columns); ++k) {
      out[StagedIndex<kStep>(k, t, tokens)] =
          k < columns ? ToActivation<Isa>(row[k]) : typename Isa::Activation{};
    }
  }
}

// Stores the features of a tile, kTileRows successive k, of token t, beginning with k = first.
template <class Isa, int kStep>
void StageFeatures(const float* values, int64_t first, int t, int tokens,
                   typename Isa::Activation* out) {
  constexpr int kAtOnce = std::min(kStep, kTileRows);
  static_assert(kTileRows % kAtOnce == 0 && kStep % kAtOnce == 0);
  typename Isa::Activation row[kTileRows];
  Isa::StoreActivations(row, Isa::Load(values));
  for (int i = 0; i < kTileRows; i += kAtOnce) {
    std::memcpy(out + StagedIndex<kStep>(first + i, t, tokens), row + i, kAtOnce * sizeof(row[0]));
  }
}

// Loads values[row .. row + 16) of values [rows], or zeros where these end or `values` is null.
template <class Isa>
typename Isa::Vec LoadTileRows(const float* values, int64_t row, int64_t rows) {
  if (values == nullptr) return Isa::Zero();
  float lane[kTileRows] = {};
  std::copy_n(values + row, std::min<int64_t>(kTileRows, rows - row), lane);
  return Isa::Load(lane);
}

// Converts fp32 sums to the host's element type, rounding to nearest even.
inline void ConvertRow(DType dtype, const float* in, int64_t count, std::byte* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::kBf16) {
      reinterpret_cast<Bf16*>(out)[i] = Bf16::FromFloat(in[i]);
    } else if (dtype == DType::kFp16) {
      reinterpret_cast<Fp16*>(out)[i] = Fp16::FromFloat(in[i]);
    } else {
      reinterpret_cast<float*>(out)[i] = in[i];
    }
  }
}

// out[i] += in[i].
inline void AddRow(const float* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] += in[i];
}

}  // namespace cpumoe
