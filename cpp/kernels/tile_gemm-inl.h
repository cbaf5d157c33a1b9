// The driver of the floating point path: all tokens of one expert times a few pairs of tiles, by
// the fused or the panel kernels (gemm-inl.h), or by a unit of the ISA's own.
//
// Many tokens' activations exceed the L2 cache (96 tokens of 4096 fp32: 1.5 MB), and a kernel wants
// four bytes of them per cycle, more than a core gets from L3. So the pairs take turns at each KC
// columns: what the first has fetched of the activations, the others find in L2.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#include "kernels/gemm-inl.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

template <class Isa, class Codec>
class TileGemm {
  using Kernels = Gemm<Isa, Codec>;
  using Format = typename Codec::Format;
  using Geometry = typename Kernels::Geometry;
  using Pair = typename Isa::Pair;
  using Activation = typename Isa::Activation;

 public:
  static_assert(Isa::kTiles <= TilePair::kCount && Isa::kFusedTokens <= Isa::kPanelTokens);
  static constexpr int64_t kPanelBytes =
      int64_t{Isa::kTiles} * Isa::kPanelPairs * static_cast<int64_t>(sizeof(Pair));

  // The kernels for an expert's tokens, `fused_tokens` of which are still multiplied by the fused
  // one.
  static StagedForm FormFor(const TokenBlocks& blocks, int fused_tokens) {
    return blocks.tokens() <= std::min(fused_tokens, Isa::kFusedTokens) ? StagedForm::kFused
                                                                        : StagedForm::kPanel;
  }

  // c[pair][block][tile][token][16] = A * tiles^T for pairs `w` of one matrix or of two of the same
  // expert; A is staged for `form`, `panel` is kPanelBytes of scratch.
  static void Run(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                  StagedForm form, const Activation* a, Pair* panel, float* c) {
    if (form == StagedForm::kFused) {
      RunFused(codec, w, static_cast<int>(blocks.tokens()), a, c);
      return;
    }
    if constexpr (Kernels::kFolding) {
      if (w[0].fold) {
        RunPanels<true>(codec, w, blocks, a, panel, c);
        return;
      }
    }
    RunPanels<false>(codec, w, blocks, a, panel, c);
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
  static constexpr std::array<FusedKernel, Isa::kFusedTokens> kFused =
      FusedTable(std::make_integer_sequence<int, Isa::kFusedTokens>{});

  // Groups [begin, end) of kTiles tiles, decoded.
  struct Span {
    const TileView* tiles;
    const Pair* panel;
    int64_t begin, end;
  };

  static void RunFused(const Codec& codec, std::span<const TilePair> w, int tokens,
                       const Activation* a, float* c) {
    for (const TilePair& pair : w) {
      for (int first = 0; first < TilePair::kCount; first += kTiles) {
        kFused[tokens - 1](codec, &pair.tiles[first], a, pair.groups, c);
        c += kTiles * tokens * kTileRows;
      }
    }
  }

  template <bool kFold>
  static void RunPanels(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                        const Activation* a, Pair* panel, float* c) {
    [[maybe_unused]] PanelUnitOf<Isa> unit;
    const int64_t groups = w[0].groups;
    std::memset(c, 0, sizeof(float) * w.size() * blocks.tokens() * TilePair::kCount * kTileRows);
    for (int64_t begin = 0; begin < groups; begin += Kernels::kPanelGroups) {
      const int64_t end = std::min<int64_t>(begin + Kernels::kPanelGroups, groups);
      float* product = c;
      for (const TilePair& pair : w) {
        for (int first = 0; first < TilePair::kCount; first += kTiles) {
          const Span span = {&pair.tiles[first], panel, begin, end};
          Kernels::template DecodePanel<kTiles, kFold>(codec, span.tiles, begin, end, panel);
          MultiplyBlocks<kFold>(unit, codec, span, groups, first, blocks, a, product);
        }
        product += blocks.tokens() * TilePair::kCount * kTileRows;
      }
    }
  }

  // Adds a span's product of all blocks to one pair's c[block][tile][token][16].
  template <bool kFold>
  static void MultiplyBlocks([[maybe_unused]] PanelUnitOf<Isa>& unit, const Codec& codec,
                             const Span& span, int64_t groups, int first, const TokenBlocks& blocks,
                             const Activation* a, float* c) {
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const int tokens = blocks.Size(b);
      const int64_t column = blocks.Begin(b) * groups + span.begin * tokens;
      float* out = c + (blocks.Begin(b) * TilePair::kCount + first * tokens) * kTileRows;
      if constexpr (HasPanelUnit<Isa>) {
        MultiplyByUnit<kFold>(unit, codec, span, a + column * Format::kGroupSize, tokens, out);
      } else {
        MultiplyByVectors<kFold>(codec, span, a + column * Format::kGroupSize, tokens, out);
      }
    }
  }

  template <bool kFold>
  static void MultiplyByVectors(const Codec& codec, const Span& s, const Activation* a, int tokens,
                                float* c) {
    constexpr auto kCounts = std::make_integer_sequence<int, Isa::kPanelTokens>{};
    if constexpr (kFold) {
      static constexpr auto kPanel = PanelTable(kCounts);
      kPanel[tokens - 1](s.panel, a, (s.end - s.begin) * Geometry::kGroupPairs, c);
    } else {
      static constexpr auto kScaledPanel = ScaledPanelTable(kCounts);
      kScaledPanel[tokens - 1](codec, s.tiles, s.begin, s.end, s.panel, a, c);
    }
  }

  template <bool kFold>
  static void MultiplyByUnit(PanelUnitOf<Isa>& unit, const Codec& codec, const Span& s,
                             const Activation* a, int tokens, float* c) {
    if constexpr (kFold) {
      unit.Multiply(s.panel, a, tokens, (s.end - s.begin) * Geometry::kGroupPairs, c);
    } else {
      for (int64_t g = s.begin; g < s.end; ++g) {
        alignas(64) float part[kTiles * Isa::kPanelTokens * kTileRows] = {};
        const int64_t pair = (g - s.begin) * Geometry::kGroupPairs;
        unit.Multiply(s.panel + pair * kTiles, a + pair * 2 * tokens, tokens, Geometry::kGroupPairs,
                      part);
        Kernels::template AddScaled<kTiles>(codec, s.tiles, g, tokens, part, c);
      }
    }
  }
};

}  // namespace cpumoe
