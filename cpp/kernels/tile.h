// The packed tile: the one weight layout that every ISA computes from.
//
// A tile is 16 output rows of a matrix. Along K it is a sequence of 64-byte vectors of sixteen
// 32-bit lanes. Lane r holds the next 32 / code_bits codes of row r:
//
//          lane r, codes of 4 bits      bit 31 ............ 16 15 ............. 0
//                                          k7   k3   k5   k1   k6   k2   k4   k0
//
// Even k are in the low half-word and odd k in the high half-word, at equal places. One shift
// brings the codes of a pair (k, k+1) to the bottom of both half-words. Used as 16-bit table
// indices they give the bf16 pair that a dot instruction takes; used as 32-bit indices they give
// one fp32 per lane. Low nibbles are pairs 0 and 1, high nibbles are pairs 2 and 3, which suits
// byte shuffles.
//
// There are no horizontal sums. The scales of a run of groups are one vector: scales[run][16]. In
// most formats a run is one group (kPackedDepthOf in base/float_types.h). The last run of a
// tile may be shorter.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/bits.h"

namespace cpumoe {

inline constexpr int kTileRows = 16;
// Successive k that kernels multiply together: a group. Packed scales belong to whole groups,
// whatever a format's own grid of scales is, and byte paths round a group of activations as a
// whole.
inline constexpr int kGroupSize = 32;
// The groups of a row of `columns` weights or activations. A last group that the row does not fill
// has zeros behind the row's end, in tiles as in staged activations.
constexpr int64_t GroupsOf(int64_t columns) { return CeilDiv(columns, kGroupSize); }
constexpr int64_t PaddedColumns(int64_t columns) { return GroupsOf(columns) * kGroupSize; }
inline constexpr int kVectorBytes = kTileRows * 4;

// The bit of the low half-word at which the even code of a vector's pair (k, k+1) begins.
template <int kCodeBits>
constexpr int PairShift(int pair) {
  const int half = 16 / kCodeBits / 2;
  return half == 0 ? 0 : (pair % half * 2 + pair / half) * kCodeBits;
}

// The byte paths multiply four successive k at once, a quad. Quad q of a vector is k = 4q..4q+3.
// Its codes are nibble q of each byte of a lane, in the order kQuadOrder.
inline constexpr int kQuadDepth = 4;
inline constexpr int kQuadOrder[kQuadDepth] = {0, 2, 1, 3};

// The k of a group that is at place i in the order of its quads.
constexpr int InQuadOrder(int i) {
  return i / kQuadDepth * kQuadDepth + kQuadOrder[i % kQuadDepth];
}

// Geometry of a tile whose codes have `kCodeBits` bits.
template <int kCodeBits>
struct TileGeometry {
  static constexpr int kVectorDepth = 32 / kCodeBits;    // k per vector
  static constexpr int kVectorPairs = kVectorDepth / 2;  // pairs (k, k+1) per vector
  static constexpr int kVectorQuads = kVectorDepth / kQuadDepth;
  static constexpr int kGroupPairs = kGroupSize / 2;
  static constexpr int kGroupQuads = kGroupSize / kQuadDepth;
  static constexpr int kGroupVectors = kGroupSize / kVectorDepth;
  static constexpr int kGroupBytes = kGroupVectors * kVectorBytes;
  static_assert(kGroupSize % kVectorDepth == 0 && kVectorDepth % 2 == 0);
};

struct TileView {
  const std::byte* codes;   // [groups][kGroupVectors][16 lanes] 32-bit words
  const std::byte* scales;  // [runs][16] of the format's scale type

  // The codes of the tile that will be read after this one, or null if that is not known. The next
  // tile has an equal geometry, and its scales follow its codes as PackedLayout has it.
  const std::byte* next = nullptr;
};

// Two tiles that are multiplied with the same activations. Both may be one tile.
struct TilePair {
  static constexpr int kCount = 2;

  std::array<TileView, kCount> tiles;
  int64_t groups;
  bool fold;  // all scales multiply their codes exactly in the ISA's floating point type
};

// Tells each tile of `w` which tile follows it, where `at_once` tiles are read side by side.
inline void LinkTiles(std::span<TilePair> w, int at_once) {
  TileView* previous[TilePair::kCount] = {};
  for (TilePair& pair : w) {
    for (int r = 0; r < TilePair::kCount; ++r) {
      TileView*& before = previous[r % at_once];
      if (before != nullptr) before->next = pair.tiles[r].codes;
      before = &pair.tiles[r];
    }
  }
}

}  // namespace cpumoe
