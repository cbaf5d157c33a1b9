// Staged activations: a block of tokens laid out as the micro-kernels read it.
//
//   [K/2][tokens][2] of Isa::Activation: a token's pair (k, k+1) is one broadcast, and the pairs of
//   all tokens of the block for one k follow each other in memory.
#pragma once

#include <cstddef>
#include <cstdint>
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

// Gathers rows token[0..tokens) of x [*, columns] (row_stride elements apart) into `out`.
template <class Isa, class Element>
void StageBlock(const Element* x, int64_t row_stride, const int32_t* token, int tokens,
                int64_t columns, typename Isa::Activation* out) {
  for (int t = 0; t < tokens; ++t) {
    const Element* row = x + token[t] * row_stride;
    for (int64_t p = 0; p < columns / 2; ++p) {
      typename Isa::Activation* pair = out + (p * tokens + t) * 2;
      pair[0] = ToActivation<Isa>(row[2 * p]);
      pair[1] = ToActivation<Isa>(row[2 * p + 1]);
    }
  }
}

template <class Isa>
void StageBlock(DType dtype, const void* x, int64_t row_stride, const int32_t* token, int tokens,
                int64_t columns, typename Isa::Activation* out) {
  VisitElements(dtype, x, [&](const auto* elements) {
    StageBlock<Isa>(elements, row_stride, token, tokens, columns, out);
  });
}

// Stores `count` successive k of one token of a staged block: `out` points at the block's pair of
// the first of them.
template <class Isa>
void StageTile(const float* values, int token, int tokens, int count,
               typename Isa::Activation* out) {
  for (int i = 0; i < count; ++i) {
    out[((i / 2) * tokens + token) * 2 + i % 2] = Isa::ToActivation(values[i]);
  }
}

// fp32 sums to the host's element type, round to nearest even.
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

}  // namespace cpumoe
