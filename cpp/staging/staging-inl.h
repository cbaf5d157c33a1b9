// The definition of staging, for the one translation unit of a variant that instantiates it.
#pragma once

#include <type_traits>

#include "staging/digits-inl.h"
#include "staging/quantize-inl.h"
#include "staging/stage-inl.h"
#include "staging/staging.h"

namespace cpumoe {

// Calls body(std::integral_constant<int, kStep>) with the step of a form (stage-inl.h).
template <class Isa, class Body>
void WithStep(StagedForm form, Body&& body) {
  constexpr int kFusedStep = 2;
  if (Isa::kPanelStep != kFusedStep && form == StagedForm::kPanel) {
    body(std::integral_constant<int, Isa::kPanelStep>{});
  } else {
    body(std::integral_constant<int, kFusedStep>{});
  }
}

template <class Isa>
void FloatStaging<Isa>::Rows(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                             const int32_t* token, int tokens, int64_t columns, Activation* block) {
  WithStep<Isa>(form, [&](auto step) {
    VisitElements(dtype, x, [&](const auto* elements) {
      StageBlock<Isa, step>(elements, row_stride, token, tokens, columns, block);
    });
  });
}

template <class Isa>
void FloatStaging<Isa>::Features(StagedForm form, const float* h, int64_t first, int t, int tokens,
                                 Activation* block) {
  WithStep<Isa>(form, [&](auto step) { StageFeatures<Isa, step>(h, first, t, tokens, block); });
}

template <class Isa>
void ByteStaging<Isa>::DigitRows(const ByteWeights& weights, DType dtype, const void* x,
                                 int64_t row_stride, const int32_t* token, int tokens,
                                 int64_t columns, std::byte* block) {
  const DigitStage stage(weights, dtype);
  auto* groups = reinterpret_cast<DigitGroup*>(block);
  VisitElements(dtype, x, [&](const auto* elements) {
    for (int t = 0; t < tokens; ++t) {
      stage.Row(elements + token[t] * row_stride, columns, groups + t, tokens);
    }
  });
}

template <class Isa>
void ByteStaging<Isa>::DigitFeatures(const ByteWeights& weights, DType dtype, const float* h,
                                     int64_t first, int t, int tokens, std::byte* block) {
  auto* groups = reinterpret_cast<DigitGroup*>(block);
  DigitStage(weights, dtype).Write(h, groups[first / kGroupSize * tokens + t]);
}

template <class Isa>
void ByteStaging<Isa>::QuadRows(const ByteWeights& weights, DType dtype, const void* x,
                                int64_t row_stride, const int32_t* token, int tokens,
                                int64_t columns, std::byte* block) {
  const QuadStage<Isa> stage(weights, block, tokens, columns);
  VisitElements(dtype, x, [&](const auto* elements) {
    for (int t = 0; t < tokens; ++t) stage.Row(elements + token[t] * row_stride, t, columns);
  });
}

template <class Isa>
void ByteStaging<Isa>::QuadFeatures(const ByteWeights& weights, const float* h, int64_t first,
                                    int t, int tokens, int64_t columns, std::byte* block) {
  QuadStage<Isa>(weights, block, tokens, columns).Group(h, t, first / kGroupSize);
}

}  // namespace cpumoe
