// The panel GEMM on AMX's tile registers: TDPBF16PS.
//
//   C [tokens][16] fp32, per tile of W  +=  A [tokens][32 k] bf16  x  B [16 pairs of k][16 rows][2]
//
//         wide: two tiles,            widest: two tiles,          tall: one tile,
//         up to 32 tokens             33 to 48 tokens             up to 64 tokens
//   tmm0  C of tokens 0-15, tile 0    C of set 0, tile 0          C of tokens 0-15
//   tmm1  C of tokens 0-15, tile 1    C of set 0, tile 1          C of tokens 16-31
//   tmm2  C of tokens 16-31, tile 0   C of set 1, tile 0          C of tokens 32-47
//   tmm3  C of tokens 16-31, tile 1   C of set 1, tile 1          C of tokens 48-63
//   tmm4  A of tokens 0-15            C of set 2, tile 0          A of 16 tokens but the last ones
//   tmm5  A of tokens 16-31           C of set 2, tile 1          A of the last up to 16 tokens
//   tmm6  B of tile 0                 A of one set at a time      B
//   tmm7  B of tile 1                 B of one tile at a time     -
//
// The widest shape has one tile for A, whose rows are as many as those of C. Therefore its three
// sets of tokens have equal sizes. The last set may share up to two tokens with the set before it.
// Their sums are computed twice, with equal bits.
//
// A panel of W has exactly the layout of B: 16 pairs of k are 16 rows of 64 bytes. A is staged in
// steps of 32 k, so that the 64 bytes of a token are one row. C stays in its registers over the
// whole of K.
//
// Cycles of a Granite Rapids core at 4.1 GHz, for 16 rows x 32 k:
//
//   17.5  a product of 16 tokens; 11 for up to 8 tokens; 18 with a B of its own
//    9    loading 16 lines from L1, 12 from L2
//   17    storing C; 57 where a product into a cleared C has to be waited for
//   47    decoding: 36 instructions on port 0 (VPERMW needs it besides port 5), 16 stores
//
// Decoding and products overlap where their operands are in L1, and slow each other down. Together
// they take 51 cycles for up to 8 tokens, 60 for 16 tokens, 70 for 32 tokens (35 of them for the
// products). The tall shape takes 100 cycles for 48 tokens and 130 for 64 tokens (70 of them for
// the products).
//
// The tall shape's time grows by two cycles for each token, whose A is a line from L2. Two tiles
// share these lines. For 48 tokens, the widest shape therefore reads 24 lines of A for each 16 rows
// x 32 k instead of 48, and loads 7 tiles instead of 8 for six products. Decoding and products stay
// the same. (Counted, not measured. Two loads of A find the lines in L1. Registers are renamed: the
// tall shape's products take 17.5 cycles each, though they reload tmm4.)
//
// A panel of 16 or 32 KiB, decoded once for all blocks of 32 tokens, was slower with 96 tokens (240
// against 200 cycles of two tall blocks). C then goes to memory and back for every panel (180
// cycles), and A pushes the panel out of L1.
//
// TDPBF16PS adds the products of even k in one chain and those of odd k in another, then both to C.
// It treats denormals as zero, whatever MXCSR says.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/bits.h"
#include "kernels/amx/tile_instructions.h"
#include "kernels/tile.h"

namespace cpumoe::amx {

// Configures the calling thread's tiles at its first use, and releases them in its destructor. A
// thread that waits then has no tile state to save.
class PanelUnit {
 public:
  static constexpr int kWideTokens = 3 * kMaxRows;
  static constexpr int kTokens = 4 * kMaxRows;
  static constexpr int kStepPairs = 16;

  PanelUnit() = default;
  PanelUnit(const PanelUnit&) = delete;
  PanelUnit& operator=(const PanelUnit&) = delete;
  ~PanelUnit() {
    if (tokens_ != 0) Release();
  }

  // C [kTiles][tokens][16] = 0, for two tiles and up to kWideTokens tokens, or one tile and up to
  // kTokens tokens.
  template <int kTiles>
  void Begin(int tokens) {
    Shape(kTiles, tokens);
    Zero<0>();
    Zero<1>();
    if (kTiles * tokens <= 2 * kMaxRows) return;
    Zero<2>();
    Zero<3>();
    if (kTiles * tokens <= 4 * kMaxRows) return;
    Zero<4>();
    Zero<5>();
  }

  // C += a[tokens][32] * panel[kTiles][16], where tiles are `distance` pairs apart.
  template <int kTiles, class Pair, class Activation>
  inline __attribute__((always_inline)) void Step(const Pair* panel, int64_t distance,
                                                  const Activation* a) {
    static_assert(sizeof(Pair) == kMaxRowBytes && sizeof(Activation) == 2);
    const auto* w = reinterpret_cast<const std::byte*>(panel);
    const auto* x = reinterpret_cast<const std::byte*>(a);
    if constexpr (kTiles == 1) {
      StepTall(w, x);
    } else if (last_ < 2) {
      StepWide(w, w + distance * kRow, x);
    } else {
      StepWidest(w, w + distance * kRow, x);
    }
  }

  // Stores C to c.
  template <int kTiles>
  void End(float* c) const {
    auto* first = reinterpret_cast<std::byte*>(c);
    if constexpr (kTiles == 2) {
      std::byte* second = first + tokens_ * kRow;
      Store<0>(first, kRow);
      Store<1>(second, kRow);
      if (last_ == 0) return;
      Store<2>(first + set1_, kRow);
      Store<3>(second + set1_, kRow);
      if (last_ == 1) return;
      Store<4>(first + set2_, kRow);
      Store<5>(second + set2_, kRow);
    } else {
      Store<0>(first, kRow);
      if (last_ >= 1) Store<1>(first + kRows, kRow);
      if (last_ >= 2) Store<2>(first + 2 * kRows, kRow);
      if (last_ >= 3) Store<3>(first + 3 * kRows, kRow);
    }
  }

  // Multiplies full tiles and does nothing else. Returns the multiply-accumulates done.
  static int64_t Dots(int64_t rounds) {
    constexpr int kTwoSets = 2 * kMaxRows;
    PanelUnit unit;
    unit.Shape(2, kTwoSets);
    for (int64_t round = 0; round < rounds; ++round) {
      DotBf16<0, 4, 6>();
      DotBf16<1, 4, 7>();
      DotBf16<2, 5, 6>();
      DotBf16<3, 5, 7>();
    }
    return rounds * kTwoSets * 2 * kTileRows * 2 * kStepPairs;
  }

 private:
  static constexpr int64_t kRow = kMaxRowBytes;  // of A, B and C
  static constexpr int64_t kRows = kMaxRows * kRow;

  void Shape(int tiles, int tokens) {
    if (tiles == tiles_ && tokens == tokens_) return;
    tiles_ = tiles;
    tokens_ = tokens;
    last_ = (tokens - 1) / kMaxRows;
    set1_ = kRows;
    TileConfig config;
    const auto set = [&config](int tile, int rows) {
      config.rows[tile] = static_cast<uint8_t>(rows);
      config.row_bytes[tile] = static_cast<uint16_t>(kMaxRowBytes);
    };
    if (tiles == 2 && last_ == 2) {
      const auto rows = static_cast<int>(CeilDiv(tokens, 3));
      set1_ = rows * kRow;
      set2_ = (tokens - rows) * kRow;
      for (int tile = 0; tile <= 6; ++tile) set(tile, rows);
      set(7, kStepPairs);
      return LoadConfig(config);
    }
    // A tile has 16 tokens, except that the last one may have fewer.
    const auto rows_of = [tokens](int part) {
      return std::clamp(tokens - part * kMaxRows, 1, kMaxRows);
    };
    for (int c = 0; c < 4; ++c) set(c, rows_of(tiles == 2 ? c / 2 : c));
    set(4, kMaxRows);
    set(5, rows_of(last_));
    if (last_ == 0) set(4, tokens);
    for (const int b : {6, 7}) set(b, kStepPairs);
    LoadConfig(config);
  }

  void StepWide(const std::byte* w0, const std::byte* w1, const std::byte* x) const {
    Load<4>(x, kRow);
    Load<6>(w0, kRow);
    DotBf16<0, 4, 6>();
    Load<7>(w1, kRow);
    DotBf16<1, 4, 7>();
    if (last_ == 0) return;
    Load<5>(x + kRows, kRow);
    DotBf16<2, 5, 6>();
    DotBf16<3, 5, 7>();
  }

  void StepWidest(const std::byte* w0, const std::byte* w1, const std::byte* x) const {
    Load<7>(w0, kRow);
    Load<6>(x, kRow);
    DotBf16<0, 6, 7>();
    Load<6>(x + set1_, kRow);
    DotBf16<2, 6, 7>();
    Load<6>(x + set2_, kRow);
    DotBf16<4, 6, 7>();
    Load<7>(w1, kRow);
    DotBf16<5, 6, 7>();
    Load<6>(x + set1_, kRow);
    DotBf16<3, 6, 7>();
    Load<6>(x, kRow);
    DotBf16<1, 6, 7>();
  }

  void StepTall(const std::byte* w, const std::byte* x) const {
    Load<6>(w, kRow);
    switch (last_) {
      case 3:
        Full<2>(x);
        [[fallthrough]];
      case 2:
        Full<1>(x);
        [[fallthrough]];
      case 1:
        Full<0>(x);
    }
    Load<5>(x + last_ * kRows, kRow);
    switch (last_) {
      case 0:
        return DotBf16<0, 5, 6>();
      case 1:
        return DotBf16<1, 5, 6>();
      case 2:
        return DotBf16<2, 5, 6>();
      case 3:
        return DotBf16<3, 5, 6>();
    }
  }

  // Multiplies tokens 16 * kPart to 16 * kPart + 15, which are not the last ones.
  template <int kPart>
  static void Full(const std::byte* x) {
    Load<4>(x + kPart * kRows, kRow);
    DotBf16<kPart, 4, 6>();
  }

  int tiles_ = 0;
  int tokens_ = 0;               // the tokens that the tiles are shaped for; 0 if not configured
  int last_ = 0;                 // sets of tokens before the last one
  int64_t set1_ = 0, set2_ = 0;  // where sets begin in the wide and the widest shape, in bytes
};

}  // namespace cpumoe::amx
