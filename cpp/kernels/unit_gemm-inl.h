// The panel kernel on ISAs with a panel unit (HasPanelUnit): the unit multiplies a group's panel
// while vector instructions decode the next groups.
//
// Every block of tokens streams the whole depth of the tiles through the unit, as many tiles at a
// time as the unit has sums for. A tile is in the nearest caches when the second block decodes it
// again. Decoding again costs less than writing and reading a panel, because it happens beside the
// products.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>
#include <type_traits>

#include "base/bits.h"
#include "kernels/gemm-inl.h"
#include "kernels/isa.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

template <HasPanelUnit Isa, class Codec>
class UnitGemm {
  using Kernels = Gemm<Isa, Codec>;
  using Geometry = typename Kernels::Geometry;
  using Pair = typename Isa::Pair;
  using Activation = typename Isa::Activation;
  using Unit = PanelUnitOf<Isa>;

  static constexpr int kTiles = Isa::kTiles;

 public:
  // How many tiles of a pair are read side by side.
  static int TilesAtOnce(const TokenBlocks& blocks) {
    return blocks.Size(0) > Unit::kWideTokens ? 1 : kTiles;
  }

  // Computes what TileGemm::Run computes, for the panel form. If kFold, all scales fold.
  template <bool kFold>
  static void Run(const Codec& codec, std::span<const TilePair> w, const Activation* a, Pair* panel,
                  const Product& c) {
    const TokenBlocks& blocks = c.blocks();
    const int at_once = TilesAtOnce(blocks);
    Unit unit;
    for (int64_t pair = 0; pair < std::ssize(w); ++pair) {
      const int64_t groups = w[pair].groups;
      for (int first = 0; first < TilePair::kCount; first += at_once) {
        const TileView* tiles = &w[pair].tiles[first];
        for (int64_t b = 0; b < blocks.count(); ++b) {
          const Block block = {tiles, groups, blocks.Size(b),
                               a + blocks.Begin(b) * groups * kGroupSize, c.At(pair, b, first)};
          if (at_once == kTiles) {
            StreamBlock<kFold, kTiles>(unit, codec, block, panel);
          } else {
            StreamBlock<kFold, 1>(unit, codec, block, panel);
          }
        }
      }
    }
  }

 private:
  // Tiles, and a block of tokens with which they are multiplied.
  struct Block {
    const TileView* tiles;
    int64_t groups;
    int tokens;
    const Activation* a;
    float* c;  // [tile][token][16]
  };

  // The sums of a block where scales fold: they stay in the unit over the whole of K.
  template <int kAtOnce>
  class WholeSums {
   public:
    WholeSums(Unit& unit, const Codec&, const Block& block) : unit_(unit), c_(block.c) {
      unit.template Begin<kAtOnce>(block.tokens);
    }
    void BeginGroup(int64_t /*g*/) {}
    void Finish() { unit_.template End<kAtOnce>(c_); }

   private:
    Unit& unit_;
    float* c_;
  };

  // The sums of a block where scales do not fold: those of a run of groups leave the unit when the
  // next run begins. Vector instructions scale several runs at once, just before later sums leave.
  // By then the products and stores had the time in which a run is decoded, so that little waits
  // for them. C is read and written once for several runs.
  template <int kAtOnce>
  class RunSums {
   public:
    RunSums(Unit& unit, const Codec& codec, const Block& block)
        : unit_(unit),
          codec_(codec),
          block_(block),
          size_(int64_t{kAtOnce} * block.tokens * kTileRows),
          at_once_(kMost * size_ <= std::ssize(sums_) ? kMost : kLeast) {
      std::memset(block.c, 0, sizeof(float) * size_);
    }

    void BeginGroup(int64_t g) {
      if (g % Kernels::kRun != 0) return;
      if (g > 0) Leave(g / Kernels::kRun - 1);
      unit_.template Begin<kAtOnce>(block_.tokens);
    }

    void Finish() {
      const int64_t last = CeilDiv(block_.groups, int64_t{Kernels::kRun}) - 1;
      Leave(last);
      for (int64_t run = last - last % at_once_; run <= last; ++run) Add<1>(run);
    }

   private:
    // Runs that are scaled at once. Their sums must leave enough of L1 to activations.
    static constexpr int kMost = 4, kLeast = 2;
    static constexpr int kFloats = 16384 / sizeof(float);
    static_assert(kLeast * kTiles * Unit::kWideTokens * kTileRows <= kFloats);
    static_assert(kLeast * Isa::kPanelTokens * kTileRows <= kFloats);

    float* SumsOf(int64_t run) { return &sums_[(run & (at_once_ - 1)) * size_]; }

    void Leave(int64_t run) {
      if (run > 0 && (run & (at_once_ - 1)) == 0) {
        if (at_once_ == kMost) {
          Add<kMost>(run - kMost);
        } else {
          Add<kLeast>(run - kLeast);
        }
      }
      unit_.template End<kAtOnce>(SumsOf(run));
    }

    template <int kCount>
    void Add(int64_t run) {
      Kernels::template AddScaled<kAtOnce, kCount>(codec_, block_.tiles, run * Kernels::kRun,
                                                   block_.tokens, SumsOf(run), size_, block_.c);
    }

    Unit& unit_;
    const Codec& codec_;
    const Block& block_;
    const int64_t size_;  // sums of a run
    const int at_once_;
    alignas(kCacheLine) std::array<float, kFloats> sums_;
  };

  // Vector instructions decode groups into a ring of kRing groups, which stays in L1. The unit
  // multiplies a group kLag groups later, so that the stores have time to arrive. Packed vectors
  // that are pairs need no ring, and the lag gives their bytes more time to arrive.
  template <bool kFold, int kAtOnce>
  __attribute__((flatten)) static void StreamBlock(Unit& unit, const Codec& codec,
                                                   const Block& block, Pair* panel) {
    using Sums = std::conditional_t<kFold, WholeSums<kAtOnce>, RunSums<kAtOnce>>;
    constexpr int64_t kLag = 2, kRing = 4;
    constexpr int64_t kSlot = int64_t{Geometry::kGroupPairs} * kAtOnce;
    static_assert(kRing <= Kernels::kPanelGroups);
    Sums sums(unit, codec, block);
    // Local copies let the compiler know that tile instructions do not change them.
    const Codec decoder = codec;
    const int64_t groups = block.groups;
    std::array<TileView, kAtOnce> tiles;
    std::copy_n(block.tiles, kAtOnce, tiles.begin());
    const auto multiply = [&, panel, tokens = block.tokens,
                           a = block.a](int64_t g) __attribute__((always_inline)) {
      sums.BeginGroup(g);
      const Activation* x = a + g * kGroupSize * tokens;
      if constexpr (PairedCodec<Codec, Isa>) {
        const Pair* pairs = Codec::Pairs(tiles[0].codes);
        Step<kAtOnce>(unit, pairs + g * Geometry::kGroupPairs,
                      Codec::Pairs(tiles[kAtOnce - 1].codes) - pairs, x, tokens);
      } else {
        Step<kAtOnce>(unit, panel + g % kRing * kSlot, Geometry::kGroupPairs, x, tokens);
      }
    };
    Kernels::Tiles::template ForGroups<kAtOnce>(
        tiles.data(), 0, groups, groups,
        [&, panel](int64_t g, auto fetch) __attribute__((always_inline)) {
          if constexpr (PairedCodec<Codec, Isa>) {
            for (int r = 0; r < kAtOnce; ++r) {
              for (int v = 0; v < Geometry::kGroupVectors; ++v) fetch(r, v);
            }
          } else {
            Pair* slot = panel + g % kRing * kSlot;
            Kernels::template DecodeGroup<kAtOnce, kFold>(
                decoder, tiles.data(), g, fetch,
                [slot](int r, int p) { return slot + r * Geometry::kGroupPairs + p; });
          }
          if (g >= kLag) multiply(g - kLag);
        });
    for (int64_t g = std::max<int64_t>(groups - kLag, 0); g < groups; ++g) multiply(g);
    sums.Finish();
  }

  // Multiplies one group, whose pairs of tiles are `distance` apart.
  template <int kAtOnce>
  static inline __attribute__((always_inline)) void Step(Unit& unit, const Pair* panel,
                                                         int64_t distance, const Activation* a,
                                                         int tokens) {
    for (int k = 0; k < kGroupSize; k += Isa::kPanelStep) {
      unit.template Step<kAtOnce>(panel + k / 2, distance, a + int64_t{k} * tokens);
    }
  }
};

}  // namespace cpumoe
