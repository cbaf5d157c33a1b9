// AMX: tile registers multiply the panels (panel_unit.h); everything else, few tokens above all, is
// AVX512_BF16.
//
// Crossover, by count, for 32 rows x 32 k (two tiles, one group) and T tokens, not measured: the
// fused kernel needs 32 T VDPBF16PS, a cycle each, beside some 60 for decoding. The panel costs
// about 130 instructions of decoding, folding and storing, and 2 products of at most 16 cycles for
// up to 16 tokens. They meet between 3 and 5 tokens.
#pragma once

#include "kernels/amx/panel_unit.h"
#include "kernels/avx512_bf16/ops-inl.h"

namespace cpumoe {

struct Amx : Avx512Bf16 {
  static constexpr int kCrossover = 4;
  static constexpr int kPanelTokens = amx::PanelUnit::kTokens;
  static constexpr int kPanelStep = 2 * amx::PanelUnit::kStepPairs;

  using PanelUnit = amx::PanelUnit;
  static_assert(kTiles == 2);
};

}  // namespace cpumoe
