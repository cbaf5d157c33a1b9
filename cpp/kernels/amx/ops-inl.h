// AMX: tile registers multiply panels (panel_unit.h). The few tokens of an expert are multiplied as
// bytes, by AVX512_VNNI. VDPBF16PS is no help for them: on Intel's CPUs it takes two cycles of both
// ports, four times as long as VPDPBUSD.
//
// The limits come from measurements on Granite Rapids (2 cores, 4.1 GHz), in cycles for 16 rows
// x 32 k in L2:
//
//   tokens                        1    2    3    6   12   16   32   64
//   two digits                   29   44
//   three digits                 33   56   75  138  260
//   bytes (int8)                 25   30   36   55  100
//   VDPBF16PS                    62   95
//   tiles                        51   51   51   55   56   60   70  130
//
// One core's share of the memory bandwidth reads such a piece, 272 bytes, in 66 cycles.
#pragma once

#include "kernels/amx/panel_unit.h"
#include "kernels/avx512_bf16/ops-inl.h"

namespace cpumoe {

struct Amx : Avx512Bf16 {
  static constexpr int kFusedTokens = 4;
  static constexpr int kUnscaledFusedTokens = kFusedTokens;
  static constexpr int kFusedLimit = 0;  // VDPBF16PS is never the fastest
  static constexpr int kQuadLimit = 6;
  // Four groups (8 KiB), because the unit multiplies groups later than they are decoded.
  static constexpr int kPanelPairs = 64;
  static constexpr int kPanelTokens = amx::PanelUnit::kTokens;
  static constexpr int kPanelStep = 2 * amx::PanelUnit::kStepPairs;

  using PanelUnit = amx::PanelUnit;
  static_assert(kTiles == 2);
};

}  // namespace cpumoe
