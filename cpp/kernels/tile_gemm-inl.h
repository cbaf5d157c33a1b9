// The driver of gemm-inl.h: all tokens of one expert times two tiles, by the fused or the panel
// kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/gemm-inl.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

template <class Isa, class Codec>
class TileGemm {
  using Kernels = Gemm<Isa, Codec>;
  using Geometry = typename Kernels::Geometry;
  using Pair = typename Isa::Pair;
  using Activation = typename Isa::Activation;

 public:
  static_assert(Isa::kTiles <= TilePair::kCount && Isa::kFusedTokens <= Isa::kPanelTokens);
  static constexpr int64_t kPanelBytes =
      int64_t{Isa::kTiles} * Isa::kPanelPairs * static_cast<int64_t>(sizeof(Pair));

  // c[block][tile][token][16] = A * tiles^T; a[block][K/2][token][2]. `panel` is kPanelBytes of
  // scratch. With `invariant`, the panel kernels run whatever the number of tokens.
  static void Run(const Codec& codec, const TilePair& w, const TokenBlocks& blocks, bool invariant,
                  const Activation* a, Pair* panel, float* c) {
    const bool fused = blocks.count() == 1 && blocks.Size(0) <= Isa::kFusedTokens && !invariant;
    for (int first = 0; first < TilePair::kCount; first += Isa::kTiles) {
      if (fused) {
        const int tokens = blocks.Size(0);
        kFused[tokens - 1](codec, &w.tiles[first], a, w.groups, c + first * tokens * kTileRows);
        continue;
      }
      if constexpr (Kernels::kFolding) {
        if (w.fold) {
          RunPanel<true>(codec, w, first, blocks, a, panel, c);
          continue;
        }
      }
      RunPanel<false>(codec, w, first, blocks, a, panel, c);
    }
  }

 private:
  using FusedKernel = void (*)(Codec, const TileView*, const Activation*, int64_t, float*);
  using PanelKernel = void (*)(const Pair*, const Activation*, int64_t, float*);
  using ScaledPanelKernel = void (*)(Codec, const TileView*, int64_t, int64_t, const Pair*,
                                     const Activation*, float*);

  static constexpr int kTiles = Isa::kTiles;

  // Kernels by number of tokens, entry [tokens - 1].
  template <int... n>
  static constexpr auto FusedTable(std::integer_sequence<int, n...>) {
    return std::array<FusedKernel, sizeof...(n)>{&Kernels::template Fused<n + 1, kTiles>...};
  }
  template <int... n>
  static constexpr auto PanelTable(std::integer_sequence<int, n...>) {
    return std::array<PanelKernel, sizeof...(n)>{&Kernels::template Panel<n + 1, kTiles>...};
  }
  template <int... n>
  static constexpr auto ScaledPanelTable(std::integer_sequence<int, n...>) {
    return std::array<ScaledPanelKernel, sizeof...(n)>{
        &Kernels::template ScaledPanel<n + 1, kTiles>...};
  }
  static constexpr auto kPanelCounts = std::make_integer_sequence<int, Isa::kPanelTokens>{};
  static constexpr std::array<FusedKernel, Isa::kFusedTokens> kFused =
      FusedTable(std::make_integer_sequence<int, Isa::kFusedTokens>{});

  template <bool kFold>
  static void RunPanel(const Codec& codec, const TilePair& w, int first, const TokenBlocks& blocks,
                       const Activation* a, Pair* panel, float* c) {
    const TileView* views = &w.tiles[first];
    for (int64_t begin = 0; begin < w.groups; begin += Kernels::kPanelGroups) {
      const int64_t end = std::min<int64_t>(begin + Kernels::kPanelGroups, w.groups);
      Kernels::template DecodePanel<kTiles, kFold>(codec, views, begin, end, panel);
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int tokens = blocks.Size(b);
        float* out = c + (blocks.Begin(b) * TilePair::kCount + first * tokens) * kTileRows;
        const int64_t depth = w.groups * Geometry::kGroupPairs;
        const Activation* in =
            a + (blocks.Begin(b) * depth + begin * Geometry::kGroupPairs * tokens) * 2;
        if (begin == 0) std::memset(out, 0, sizeof(float) * kTiles * tokens * kTileRows);
        if constexpr (kFold) {
          static constexpr auto kPanel = PanelTable(kPanelCounts);
          kPanel[tokens - 1](panel, in, (end - begin) * Geometry::kGroupPairs, out);
        } else {
          static constexpr auto kScaledPanel = ScaledPanelTable(kPanelCounts);
          kScaledPanel[tokens - 1](codec, views, begin, end, panel, in, out);
        }
      }
    }
  }
};

}  // namespace cpumoe
