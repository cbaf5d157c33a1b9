// The definition of PanelKernels, for the one translation unit of a variant that instantiates it.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/panel_kernels.h"
#include "kernels/panel_step-inl.h"
#include "kernels/product.h"
#include "kernels/tile.h"

namespace cpumoe {

template <class Isa, int kTokens, bool kFetches>
void MultiplyPanel(const typename Isa::Pair* panel, const typename Isa::Activation* a,
                   int64_t pairs, int64_t to_next, float* c) {
  constexpr int kTiles = Isa::kTiles;
  typename Isa::Vec sum[kTiles][kTokens];
  for (int r = 0; r < kTiles; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Isa::Load(SumsAt(c, r, t, kTokens));
  }
  for (int64_t p = 0; p < pairs; ++p) {
    if constexpr (kFetches) PanelStep<Isa>::template PrefetchPair<kTokens>(a, p, to_next);
    PanelStep<Isa>::template AddPair<kTokens, kTiles>(panel, a, p, sum);
  }
  for (int r = 0; r < kTiles; ++r) {
    for (int t = 0; t < kTokens; ++t) Isa::Store(SumsAt(c, r, t, kTokens), sum[r][t]);
  }
}

template <class Isa, bool kFetches, int... n>
constexpr typename PanelKernels<Isa>::Table PanelTable(std::integer_sequence<int, n...>) {
  return {&MultiplyPanel<Isa, n + 1, PanelKernels<Isa>::FetchesFor(kFetches, n + 1)>...};
}

template <class Isa>
const typename PanelKernels<Isa>::Table PanelKernels<Isa>::kPlain =
    PanelTable<Isa, false>(std::make_integer_sequence<int, Isa::kPanelTokens>{});
template <class Isa>
const typename PanelKernels<Isa>::Table PanelKernels<Isa>::kFetching =
    PanelTable<Isa, true>(std::make_integer_sequence<int, Isa::kPanelTokens>{});

}  // namespace cpumoe
