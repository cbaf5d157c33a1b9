// The panel GEMM on AMX's tile registers: TDPBF16PS.
//
//   C [tokens][16] fp32, per tile of W  +=  A [tokens][32 k] bf16  x  B [16 pairs of k][16 rows][2]
//
//   tmm0  C of tokens 0-15,  tile 0      tmm4  A of tokens 0-15        tmm6  B of tile 0
//   tmm1  C of tokens 0-15,  tile 1      tmm5  A of tokens 16-31       tmm7  B of tile 1
//   tmm2  C of tokens 16-31, tile 0
//   tmm3  C of tokens 16-31, tile 1
//
// A panel of W is B as it is: 16 pairs of k are 16 rows of 64 bytes, kTiles * 64 apart. A is staged
// in steps of 32 k: a token's 64 bytes are one row.
//
// The share of the tiles' peak that this can reach, by counting cycles, not measured. For 32 rows x
// 32 k and 32 b tokens:
//
//   64 b  products: four of 16 cycles
//    6 b  C from and to memory, once per panel of 16 steps: 64 lines, 32 + 64 cycles
//   66    decoding, once for all tokens: 205 instructions (4-bit codes, scales folded), of which 66
//         (VPERMW, VPTESTMW, VPMOVZXBD) share one port
//
// which is 64 b / (70 b + 66): 47 % for 32 tokens, 70 % for 96, 86 % for 512. The loads, 64 lines a
// step, hide behind the products: B, a panel of 32 KiB, comes from an L1 of 48 (16 cycles), A from
// L2 (43 cycles at 48 bytes a cycle). With twice the panel B would come from L2 as well, 85 cycles
// in all. kPanelPairs is the first thing to measure on such a CPU.
//
// TDPBF16PS adds the products of even and of odd k in a chain each, then both to C; denormals count
// as zero, whatever MXCSR says.
#pragma once

#include <cstdint>

#include "kernels/amx/tile_instructions.h"
#include "kernels/tile.h"

namespace cpumoe::amx {

// Configures the calling thread's tiles when it is first used, and releases them at its end: a
// thread that waits has no tile state to save.
class PanelUnit {
 public:
  static constexpr int kTokens = 2 * kMaxRows;
  static constexpr int kStepPairs = 16;

  PanelUnit() = default;
  PanelUnit(const PanelUnit&) = delete;
  PanelUnit& operator=(const PanelUnit&) = delete;
  ~PanelUnit() {
    if (tokens_ != 0) Release();
  }

  // c[2][tokens][16] += a[pairs / 16][tokens][32] * panel[pairs][2]; pairs is a multiple of 16.
  template <class Pair, class Activation>
  void Multiply(const Pair* panel, const Activation* a, int tokens, int64_t pairs, float* c) {
    static_assert(sizeof(Pair) == kMaxRowBytes && sizeof(Activation) == 2);
    Shape(tokens);
    if (tokens > kMaxRows) {
      Multiply<true>(panel, a, tokens, pairs / kStepPairs, c);
    } else {
      Multiply<false>(panel, a, tokens, pairs / kStepPairs, c);
    }
  }

  // Products of full tiles and nothing else; returns their multiply-accumulates.
  static int64_t Dots(int64_t rounds) {
    PanelUnit unit;
    unit.Shape(kTokens);
    for (int64_t round = 0; round < rounds; ++round) {
      DotBf16<0, 4, 6>();
      DotBf16<1, 4, 7>();
      DotBf16<2, 5, 6>();
      DotBf16<3, 5, 7>();
    }
    return rounds * kTokens * 2 * kTileRows * 2 * kStepPairs;
  }

 private:
  static constexpr int64_t kRow = kMaxRowBytes;

  void Shape(int tokens) {
    if (tokens == tokens_) return;
    tokens_ = tokens;
    const int lower = tokens < kMaxRows ? tokens : kMaxRows;
    TileConfig config;
    const auto set = [&config](int tile, int rows) {
      config.rows[tile] = static_cast<uint8_t>(rows);
      config.row_bytes[tile] = static_cast<uint16_t>(rows == 0 ? 0 : kMaxRowBytes);
    };
    for (const int tile : {0, 1, 4}) set(tile, lower);
    for (const int tile : {2, 3, 5}) set(tile, tokens - lower);
    for (const int tile : {6, 7}) set(tile, kStepPairs);
    LoadConfig(config);
  }

  // kBoth: there are more than 16 tokens.
  template <bool kBoth>
  static void Multiply(const void* panel, const void* a, int tokens, int64_t steps, float* c) {
    float* c1 = c + int64_t{tokens} * kTileRows;
    constexpr int64_t kUpper = kMaxRows * kTileRows;
    Load<0>(c, kRow);
    Load<1>(c1, kRow);
    if constexpr (kBoth) {
      Load<2>(c + kUpper, kRow);
      Load<3>(c1 + kUpper, kRow);
    }
    const auto* w = static_cast<const char*>(panel);
    const auto* x = static_cast<const char*>(a);
    for (int64_t step = 0; step < steps; ++step) {
      Load<4>(x, kRow);
      Load<6>(w, 2 * kRow);
      DotBf16<0, 4, 6>();
      Load<7>(w + kRow, 2 * kRow);
      DotBf16<1, 4, 7>();
      if constexpr (kBoth) {
        Load<5>(x + kMaxRows * kRow, kRow);
        DotBf16<2, 5, 6>();
        DotBf16<3, 5, 7>();
      }
      w += 2 * kStepPairs * kRow;
      x += tokens * kRow;
    }
    Store<0>(c, kRow);
    Store<1>(c1, kRow);
    if constexpr (kBoth) {
      Store<2>(c + kUpper, kRow);
      Store<3>(c1 + kUpper, kRow);
    }
  }

  int tokens_ = 0;  // that the tiles are shaped for; 0: not configured
};

}  // namespace cpumoe::amx
