// AMX: tile registers multiply panels (panel_unit.h). An expert's few tokens are multiplied as
// bytes, by AVX512_VNNI: on Intel's CPUs VDPBF16PS takes two cycles of both ports, four times
// VPDPBUSD.
//
// Crossovers, measured on Granite Rapids (2 cores, 4.1 GHz), in cycles for 16 rows x 32 k in L2:
//
//   tokens                        1    2    3    6   12   16   32   64
//   two digits                   29   44
//   three digits                 33   56   75  138  260
//   bytes (int8)                 25   30   36   55  100
//   VDPBF16PS                    62   95
//   tiles                        51   51   51   55   56   60   70  130
//
// One core's share of the memory read such a piece, 272 bytes, in 66 cycles.
#pragma once

#include "kernels/amx/panel_unit.h"
#include "kernels/avx512_bf16/ops-inl.h"

namespace cpumoe {

struct Amx : Avx512Bf16 {
  static constexpr int kFusedTokens = 4;
  static constexpr int kCrossover = 0;  // VDPBF16PS is never the fastest
  static constexpr int kQuadCrossover = 6;
  static constexpr int kPanelPairs = 64;  // four groups, which the unit lags behind: 8 KiB
  static constexpr int kPanelTokens = amx::PanelUnit::kTokens;
  static constexpr int kPanelStep = 2 * amx::PanelUnit::kStepPairs;

  using PanelUnit = amx::PanelUnit;
  static_assert(kTiles == 2);
};

}  // namespace cpumoe
