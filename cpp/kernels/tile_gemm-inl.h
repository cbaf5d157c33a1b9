// The GEMM driver: all tokens of one expert times one or two tiles, by the fused or the panel
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
  static constexpr int kMaxTiles = 2;
  static_assert(Isa::kTiles <= kMaxTiles && Isa::kFusedTokens <= Isa::kPanelTokens);
  static constexpr int64_t kPanelBytes =
      int64_t{Isa::kTiles} * Isa::kPanelPairs * static_cast<int64_t>(sizeof(Pair));

  // One or two tiles that are multiplied with the same activations.
  struct Operands {
    std::array<TileView, kMaxTiles> tiles;
    int count;
    int64_t groups;
    bool fold;  // all scales of the tiles multiply their codes exactly
  };

  // c[block][tile][token][16] = A * tiles^T; a[block][K/2][token][2]. `panel` is kPanelBytes of
  // scratch. With `invariant`, the panel kernels run whatever the number of tokens.
  static void Run(const Codec& codec, const Operands& w, const TokenBlocks& blocks, bool invariant,
                  const Activation* a, Pair* panel, float* c) {
    if (blocks.count() == 1 && blocks.Size(0) <= Isa::kFusedTokens && !invariant) {
      RunFused(codec, w, blocks.Size(0), a, c);
      return;
    }
    for (int first = 0; first < w.count; first += Isa::kTiles) {
      const int tiles = std::min(w.count - first, Isa::kTiles);
      if constexpr (Kernels::kFolding) {
        if (w.fold) {
          RunPanel<true>(codec, w, first, tiles, blocks, a, panel, c);
          continue;
        }
      }
      RunPanel<false>(codec, w, first, tiles, blocks, a, panel, c);
    }
  }

 private:
  using FusedKernel = void (*)(Codec, const TileView*, const Activation*, int64_t, float*);
  using PanelKernel = void (*)(const Pair*, const Activation*, int64_t, float*);
  using ScaledPanelKernel = void (*)(Codec, const TileView*, int64_t, int64_t, const Pair*,
                                     const Activation*, float*);

  // Kernels by number of tokens, entry [tokens - 1].
  template <int kTiles, int... n>
  static constexpr auto FusedTable(std::integer_sequence<int, n...>) {
    return std::array<FusedKernel, sizeof...(n)>{&Kernels::template Fused<n + 1, kTiles>...};
  }
  template <int kTiles, int... n>
  static constexpr auto PanelTable(std::integer_sequence<int, n...>) {
    return std::array<PanelKernel, sizeof...(n)>{&Kernels::template Panel<n + 1, kTiles>...};
  }
  template <int kTiles, int... n>
  static constexpr auto ScaledPanelTable(std::integer_sequence<int, n...>) {
    return std::array<ScaledPanelKernel, sizeof...(n)>{
        &Kernels::template ScaledPanel<n + 1, kTiles>...};
  }

  static void RunFused(const Codec& codec, const Operands& w, int tokens, const Activation* a,
                       float* c) {
    constexpr auto kTokens = std::make_integer_sequence<int, Isa::kFusedTokens>{};
    static constexpr auto kAll = FusedTable<Isa::kTiles>(kTokens);
    static constexpr auto kOne = FusedTable<1>(kTokens);
    for (int first = 0; first < w.count; first += Isa::kTiles) {
      const auto& kernels = w.count - first >= Isa::kTiles ? kAll : kOne;
      kernels[tokens - 1](codec, &w.tiles[first], a, w.groups, c + first * tokens * kTileRows);
    }
  }

  template <bool kFold>
  static void RunPanel(const Codec& codec, const Operands& w, int first, int tiles,
                       const TokenBlocks& blocks, const Activation* a, Pair* panel, float* c) {
    if (tiles == Isa::kTiles) {
      RunPanel<kFold, Isa::kTiles>(codec, w, first, blocks, a, panel, c);
    } else {
      RunPanel<kFold, 1>(codec, w, first, blocks, a, panel, c);
    }
  }

  template <bool kFold, int kTiles>
  static void RunPanel(const Codec& codec, const Operands& w, int first, const TokenBlocks& blocks,
                       const Activation* a, Pair* panel, float* c) {
    constexpr auto kTokens = std::make_integer_sequence<int, Isa::kPanelTokens>{};
    [[maybe_unused]] static constexpr auto kPanel = PanelTable<kTiles>(kTokens);
    [[maybe_unused]] static constexpr auto kScaledPanel = ScaledPanelTable<kTiles>(kTokens);
    const TileView* views = &w.tiles[first];
    for (int64_t begin = 0; begin < w.groups; begin += Kernels::kPanelGroups) {
      const int64_t end = std::min<int64_t>(begin + Kernels::kPanelGroups, w.groups);
      Kernels::template DecodePanel<kTiles, kFold>(codec, views, begin, end, panel);
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int tokens = blocks.Size(b);
        float* out = c + (blocks.Begin(b) * w.count + first * tokens) * kTileRows;
        const int64_t depth = w.groups * Geometry::kGroupPairs;
        const Activation* in =
            a + (blocks.Begin(b) * depth + begin * Geometry::kGroupPairs * tokens) * 2;
        if (begin == 0) std::memset(out, 0, sizeof(float) * kTiles * tokens * kTileRows);
        if constexpr (kFold) {
          kPanel[tokens - 1](panel, in, (end - begin) * Geometry::kGroupPairs, out);
        } else {
          kScaledPanel[tokens - 1](codec, views, begin, end, panel, in, out);
        }
      }
    }
  }
};

}  // namespace cpumoe
