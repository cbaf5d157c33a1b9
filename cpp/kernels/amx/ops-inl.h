// AMX: tile registers multiply the panels (panel_unit.h); everything else, few tokens above all, is
// AVX512_BF16.
//
// The int8 path has no tiles: it is AVX512_VNNI's.
//
// Crossover, by count, for 32 rows x 32 k (two tiles, one group) and T tokens, not measured: the
// fused kernel needs 32 T VDPBF16PS, a cycle each, beside some 30 for decoding. The panel costs 66
// for decoding (panel_unit.h), and for up to 16 tokens 32 for two products, or some 45 for loading
// their operands. They meet between 2 and 4 tokens. `cpumoe bench --tune` measures it.
#pragma once

#include "kernels/amx/panel_unit.h"
#include "kernels/avx512_bf16/ops-inl.h"

namespace cpumoe {

struct Amx : Avx512Bf16 {
  static constexpr int kCrossover = 0;
  static constexpr int kPanelPairs = 256;  // 32 KiB of bf16, two thirds of L1 (panel_unit.h)
  static constexpr int kPanelTokens = amx::PanelUnit::kTokens;
  static constexpr int kPanelStep = 2 * amx::PanelUnit::kStepPairs;

  // Most tokens whose bytes, one plane of them or three, are faster than bf16 in tiles.
  static constexpr int kQuadCrossover = 6;
  static constexpr int kPlanesCrossover = 1;

  using PanelUnit = amx::PanelUnit;
  static_assert(kTiles == 2);
};

}  // namespace cpumoe
