// The driver of the floating point path: all tokens of one expert times a few pairs of tiles, by
// the fused or the panel kernels (gemm-inl.h), or by a unit of the ISA's own.
//
// Many tokens' activations exceed the L2 cache (96 tokens of 4096 fp32: 1.5 MB), and a kernel wants
// four bytes of them per cycle, more than a core gets from L3. So the pairs take turns at each KC
// columns: what the first has fetched of the activations, the others find in L2.
//
// A unit of the ISA's own multiplies a group's panel while vector instructions decode the next
// ones.
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

  // Tiles of a pair that are read side by side.
  static int TilesAtOnce([[maybe_unused]] const TokenBlocks& blocks) {
    if constexpr (HasPanelUnit<Isa>) {
      if (blocks.tokens() > PanelUnitOf<Isa>::kWideTokens) return 1;
    }
    return kTiles;
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
        RunMany<true>(codec, w, blocks, a, panel, c);
        return;
      }
    }
    RunMany<false>(codec, w, blocks, a, panel, c);
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

  // Groups [begin, end) of the `groups` of kTiles tiles, and where they are decoded.
  struct Span {
    const TileView* tiles;
    Pair* panel;
    int64_t begin, end, groups;
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
  static void RunMany(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                      const Activation* a, Pair* panel, float* c) {
    if constexpr (HasPanelUnit<Isa>) {
      RunUnit<kFold>(codec, w, blocks, a, panel, c);
    } else {
      RunPanels<kFold>(codec, w, blocks, a, panel, c);
    }
  }

  template <bool kFold>
  static void RunPanels(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                        const Activation* a, Pair* panel, float* c) {
    const int64_t groups = w[0].groups;
    std::memset(c, 0, sizeof(float) * w.size() * blocks.tokens() * TilePair::kCount * kTileRows);
    for (int64_t begin = 0; begin < groups; begin += Kernels::kPanelGroups) {
      const int64_t end = std::min<int64_t>(begin + Kernels::kPanelGroups, groups);
      float* product = c;
      for (const TilePair& pair : w) {
        for (int first = 0; first < TilePair::kCount; first += kTiles) {
          const Span span = {&pair.tiles[first], panel, begin, end, groups};
          Kernels::template DecodePanel<kTiles, kFold>(codec, span.tiles, begin, end, groups,
                                                       panel);
          for (int64_t b = 0; b < blocks.count(); ++b) {
            MultiplyByVectors<kFold>(codec, span, BlockOf(span, first, blocks, b, a, product));
          }
        }
        product += blocks.tokens() * TilePair::kCount * kTileRows;
      }
    }
  }

  // A block of tokens, from a span's first column on, and its product with the span's tiles.
  struct Block {
    int tokens;
    const Activation* a;
    float* c;  // [tile][token][16]
  };

  static Block BlockOf(const Span& s, int first, const TokenBlocks& blocks, int64_t b,
                       const Activation* a, float* c) {
    const int tokens = blocks.Size(b);
    const int64_t column = blocks.Begin(b) * s.groups + s.begin * tokens;
    return {tokens, a + column * Format::kGroupSize,
            c + (blocks.Begin(b) * TilePair::kCount + first * tokens) * kTileRows};
  }

  template <bool kFold>
  static void MultiplyByVectors(const Codec& codec, const Span& s, const Block& block) {
    constexpr auto kCounts = std::make_integer_sequence<int, Isa::kPanelTokens>{};
    if constexpr (kFold) {
      static constexpr auto kPanel = PanelTable(kCounts);
      kPanel[block.tokens - 1](s.panel, block.a, (s.end - s.begin) * Geometry::kGroupPairs,
                               block.c);
    } else {
      static constexpr auto kScaledPanel = ScaledPanelTable(kCounts);
      kScaledPanel[block.tokens - 1](codec, s.tiles, s.begin, s.end, s.panel, block.a, block.c);
    }
  }

  // Every block streams the tiles' whole depth through the unit, as many tiles at a time as it has
  // sums for. A tile is in the nearest caches when the second block decodes it again, which costs
  // less than writing a panel and reading it back does, because it happens beside the products.
  template <bool kFold>
  static void RunUnit(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                      const Activation* a, Pair* panel, float* c) {
    PanelUnitOf<Isa> unit;
    const int at_once = TilesAtOnce(blocks);
    for (const TilePair& pair : w) {
      for (int first = 0; first < TilePair::kCount; first += at_once) {
        const Span span = {&pair.tiles[first], panel, 0, pair.groups, pair.groups};
        for (int64_t b = 0; b < blocks.count(); ++b) {
          const Block block = BlockOf(span, first, blocks, b, a, c);
          if (at_once == kTiles) {
            StreamToUnit<kFold, kTiles>(unit, codec, span, block);
          } else {
            StreamToUnit<kFold, 1>(unit, codec, span, block);
          }
        }
      }
      c += blocks.tokens() * TilePair::kCount * kTileRows;
    }
  }

  // The unit multiplies a group kLag groups after vector instructions have decoded it into a ring
  // of kRing, which stays in L1: time for the stores to arrive.
  template <bool kFold, int kAtOnce>
  __attribute__((flatten)) static void StreamToUnit(PanelUnitOf<Isa>& unit, const Codec& codec,
                                                    const Span& s, const Block& block) {
    constexpr int64_t kLag = 2, kRing = 4;
    constexpr int64_t kSlot = int64_t{Geometry::kGroupPairs} * kAtOnce;
    static_assert(kRing <= Kernels::kPanelGroups);
    if constexpr (kFold) {
      unit.template Begin<kAtOnce>(block.tokens);
    } else {
      std::memset(block.c, 0, sizeof(float) * kAtOnce * block.tokens * kTileRows);
    }
    // Copies, which tile instructions cannot change as far as the compiler knows.
    const Codec decoder = codec;
    std::array<TileView, kAtOnce> tiles;
    std::copy_n(s.tiles, kAtOnce, tiles.begin());
    const auto multiply = [&unit, &codec, &s, block,
                           panel = s.panel](int64_t g) __attribute__((always_inline)) {
      const Pair* slot = panel + g % kRing * kSlot;
      const Activation* a = block.a + g * Format::kGroupSize * block.tokens;
      if constexpr (kFold) {
        StepGroup<kAtOnce>(unit, slot, a, block.tokens);
      } else {
        alignas(64) float part[kTiles * PanelUnitOf<Isa>::kWideTokens * kTileRows];
        unit.template Begin<kAtOnce>(block.tokens);
        StepGroup<kAtOnce>(unit, slot, a, block.tokens);
        unit.template End<kAtOnce>(part);
        Kernels::template AddScaled<kAtOnce>(codec, s.tiles, g, block.tokens, part, block.c);
      }
    };
    Kernels::Tiles::template ForGroups<kAtOnce>(
        tiles.data(), 0, s.groups, s.groups,
        [&, panel = s.panel](int64_t g) __attribute__((always_inline)) {
          Pair* slot = panel + g % kRing * kSlot;
          Kernels::template DecodeGroup<kAtOnce, kFold>(
              decoder, tiles.data(), g,
              [slot](int r, int p) { return slot + r * Geometry::kGroupPairs + p; });
          if (g >= kLag) multiply(g - kLag);
        });
    for (int64_t g = std::max<int64_t>(s.groups - kLag, 0); g < s.groups; ++g) multiply(g);
    if constexpr (kFold) unit.template End<kAtOnce>(block.c);
  }

  template <int kAtOnce>
  static inline __attribute__((always_inline)) void StepGroup(PanelUnitOf<Isa>& unit,
                                                              const Pair* panel,
                                                              const Activation* a, int tokens) {
    for (int k = 0; k < Format::kGroupSize; k += Isa::kPanelStep) {
      unit.template Step<kAtOnce>(panel + k / 2, Geometry::kGroupPairs, a + int64_t{k} * tokens);
    }
  }
};

}  // namespace cpumoe
