// The micro-kernels of the floating point path: C = A * W^T for a few tiles of W. They are written
// once, in the vocabulary of isa.h.
//
//   A  tokens x K, staged: [K/2][tokens][2] of Isa::Activation (a pair is one broadcast; a panel
//      unit may want another step than 2)
//   W  packed tiles of 16 rows x K (tile.h)
//   C  [tiles][tokens][16] fp32
//
// The fused kernel decodes codes in registers and multiplies each multiplicand with all tokens at
// once. It sums the products that share scales unscaled, and one multiply-add applies the 16
// scales. Where scales belong to less than a group, a group consists of parts. It takes as many
// tokens as registers hold.
//
// The panel kernel decodes a KC-deep panel of the tiles to memory (L1/L2) once, then runs a
// register-tiled GEMM over all token blocks. It folds scales into the multiplicands where that is
// exact, and applies them to sums otherwise.
//
// Both kernels add a token's products in one order, for any number of tokens and tiles.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/float_types.h"
#include "kernels/isa.h"
#include "kernels/panel_step-inl.h"
#include "kernels/product.h"
#include "kernels/tile.h"

namespace cpumoe {

// Streams tiles: fetches codes and scales some groups before they are read. Hardware prefetchers
// stop at the end of every 4 KiB and do not know which tile comes next. Without Stream a core waits
// for memory a quarter of the time (docs/performance.md).
template <class Geometry, class Scale, int kRun = 1, int kParts = 1>
struct Stream {
  // Whether a group has so many lines that fetching all at once would take the fill buffers that
  // its own loads need.
  static constexpr bool kSpreads = Geometry::kGroupVectors > 4;

  static constexpr int64_t kScaleBytes =  // of kRun groups
      kParts * kTileRows * kBytesOfScale<Scale>;

  // Calls body(g, fetch) for the groups [begin, end) of kTiles tiles, kStep groups at a time. Each
  // tile has `groups` groups. Either all tiles know which tile follows them, or none does
  // (LinkTiles with kTiles tiles at once). The body calls fetch(r, v) where it reads packed vector
  // v of tile r, if kSpreads.
  template <int kTiles, int kStep = 1, class Body>
  static inline __attribute__((always_inline)) void ForGroups(const TileView* tiles, int64_t begin,
                                                              int64_t end, int64_t groups,
                                                              Body&& body) {
    // From group `last` on, the first groups of the next tiles are fetched.
    const int64_t last = tiles[0].next == nullptr ? end : std::clamp(groups - kAhead, begin, end);
    std::ptrdiff_t ahead[kTiles];  // from the codes that are read to those that are fetched
    for (int r = 0; r < kTiles; ++r) ahead[r] = kAhead * Geometry::kGroupBytes;
    int64_t g = begin;
    // The body appears once, in a loop over both ranges, because compiling it takes long.
    for (const int64_t until : {last, end}) {
      for (; g + kStep <= until; g += kStep) {
        if constexpr (!kSpreads) {
          for (int r = 0; r < kTiles; ++r) FetchCodes<kStep>(tiles[r].codes + ahead[r], g);
        }
        FetchScales<kTiles, kStep>(tiles, g, groups);
        body(g, [&](int r, int v) __attribute__((always_inline)) {
          if constexpr (kSpreads) {
            Prefetch(tiles[r].codes + ahead[r] + g * Geometry::kGroupBytes + v * kVectorBytes);
          }
        });
      }
      for (int r = 0; r < kTiles; ++r) {
        ahead[r] = tiles[r].next - tiles[r].codes + (kAhead - groups) * Geometry::kGroupBytes;
      }
    }
  }

 private:
  static constexpr int64_t kAhead = 2048 / Geometry::kGroupBytes;
  static constexpr int64_t kScalesAhead = 24;
  static constexpr int64_t kScaleGroups =  // groups whose scales share a cache line
      kRun * (kCacheLine / std::max<int64_t>(kScaleBytes, 1));
  static_assert(kScaleBytes <= kCacheLine);

  template <int kGroups>
  static inline __attribute__((always_inline)) void FetchCodes(const std::byte* codes, int64_t g) {
    for (int v = 0; v < kGroups * Geometry::kGroupVectors; ++v) {
      Prefetch(codes + g * Geometry::kGroupBytes + v * kVectorBytes);
    }
  }

  template <int kTiles, int kStep>
  static inline __attribute__((always_inline)) void FetchScales(const TileView* tiles, int64_t g,
                                                                int64_t groups) {
    if (kScaleBytes == 0 || g % kScaleGroups >= kStep) return;
    for (int r = 0; r < kTiles; ++r) {
      const bool own = g + kScalesAhead < groups || tiles[r].next == nullptr;
      if constexpr (kRun == 1) {
        const std::byte* scales =
            own ? tiles[r].scales : tiles[r].next + groups * (Geometry::kGroupBytes - kScaleBytes);
        Prefetch(scales + (g + kScalesAhead) * kScaleBytes);
      } else if (own) {
        Prefetch(tiles[r].scales + (g + kScalesAhead) / kRun * kScaleBytes);
      } else {
        const std::byte* scales = tiles[r].next + groups * Geometry::kGroupBytes;
        Prefetch(scales + (g + kScalesAhead - groups) / kRun * kScaleBytes);
      }
    }
  }
};

// Calls body(std::integral_constant<int, i>) for i in [0, kCount), unrolled.
template <int kCount, class Body>
inline __attribute__((always_inline)) void Unroll(Body&& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

template <class Isa, class Codec>
struct Gemm {
  static_assert(TileCodec<Codec, Isa>);
  using Format = typename Codec::Format;
  using Geometry = TileGeometry<Format::kCodeBits>;
  using Scale = PackedScaleOf<Format>;
  using Activation = typename Isa::Activation;
  using Pair = typename Isa::Pair;
  using Vec = typename Isa::Vec;

  // Groups that share scales, and parts of a group that have scales of their own.
  static constexpr int kRun = std::max(kPackedDepthOf<Format> / kGroupSize, 1);
  static constexpr int kParts = std::max(kGroupSize / kPackedDepthOf<Format>, 1);
  static_assert(kPackedDepthOf<Format> * kParts == kGroupSize * kRun);
  static constexpr int kPartVectors = Geometry::kGroupVectors / kParts;
  static constexpr int kPartDepth = kGroupSize / kParts;
  static constexpr int kPartBytes = kPartVectors * kVectorBytes;
  static_assert(kPartVectors * kParts == Geometry::kGroupVectors);

  using Step = PanelStep<Isa>;
  using Tiles = Stream<Geometry, Scale, kRun, kParts>;

  static constexpr bool kScaled = HasScales<Format>;
  static constexpr bool kFolding = !kScaled || FoldingCodec<Codec, Isa>;
  static constexpr int kPanelGroups = Isa::kPanelPairs / Geometry::kGroupPairs;
  static_assert(Isa::kPanelPairs % Geometry::kGroupPairs == 0 && kPanelGroups % kRun == 0);

  // The scales of part `part` of a tile, which is group `part` if kParts is 1.
  static const Scale* ScalesOf(const TileView& tile, int64_t part) {
    return reinterpret_cast<const Scale*>(tile.scales) + part / kRun * kTileRows;
  }

  template <int kTokens, int kTiles>
  static void Fused(Codec codec, const TileView* tiles, const Activation* a, int64_t groups,
                    float* c) {
    if constexpr (kRun > 1) {
      for (int i = 0; i < kTiles * kTokens; ++i) Isa::Store(c + i * kTileRows, Isa::Zero());
      for (int64_t run = 0; run < groups; run += kRun) {
        KeepInMemory();
        Vec sum[1][kTiles][kTokens];
        Clear(sum[0]);
        Tiles::template ForGroups<kTiles>(
            tiles, run, std::min<int64_t>(run + kRun, groups), groups,
            [&](int64_t g, auto fetch) __attribute__((always_inline)) {
              AddParts<1, kTokens, kTiles>(codec, tiles, g, a, fetch, sum);
            });
        AddScaled(codec, tiles, run, sum[0], c);
      }
    } else if constexpr (kScaled) {
      // A sum is a chain of dependent instructions. With few sums, two parts are summed at once.
      static_assert(!Tiles::kSpreads);
      constexpr int kAtOnce = kTiles * kTokens <= 2 ? 2 : 1;
      constexpr int kStep = std::max(kAtOnce / kParts, 1);  // groups
      for (int i = 0; i < kTiles * kTokens; ++i) Isa::Store(c + i * kTileRows, Isa::Zero());
      const int64_t whole = groups / kStep * kStep;
      Tiles::template ForGroups<kTiles, kStep>(
          tiles, 0, whole, groups, [&](int64_t g, auto) __attribute__((always_inline)) {
            Unroll<kStep * kParts / kAtOnce>([&](auto i) __attribute__((always_inline)) {
              FusedParts<kAtOnce, kTokens, kTiles>(codec, tiles, g * kParts + i * kAtOnce, a, c);
            });
          });
      if (whole < groups) FusedParts<1, kTokens, kTiles>(codec, tiles, whole, a, c);
    } else {
      // Sums stay in registers over the whole of K.
      Vec sum[1][kTiles][kTokens];
      Clear(sum[0]);
      Tiles::template ForGroups<kTiles>(
          tiles, 0, groups, groups, [&](int64_t g, auto fetch) __attribute__((always_inline)) {
            AddParts<1, kTokens, kTiles>(codec, tiles, g, a, fetch, sum);
          });
      for (int r = 0; r < kTiles; ++r) {
        for (int t = 0; t < kTokens; ++t) Isa::Store(SumsAt(c, r, t, kTokens), sum[0][r][t]);
      }
    }
  }

  // Decodes groups [begin, end) of the tiles' `groups` into panel[pair][tile]. If `streams`, also
  // fetches later groups.
  template <int kTiles, bool kFold>
  __attribute__((flatten)) static void DecodePanel(const Codec& codec, const TileView* tiles,
                                                   int64_t begin, int64_t end, int64_t groups,
                                                   bool streams, Pair* panel) {
    const auto decode = [&](int64_t g, auto fetch) __attribute__((always_inline)) {
      DecodeGroup<kTiles, kFold>(codec, tiles, g, fetch,
                                 [panel](int r, int p) { return panel + p * kTiles + r; });
      panel += Geometry::kGroupPairs * kTiles;
    };
    if (streams) {
      Tiles::template ForGroups<kTiles>(tiles, begin, end, groups, decode);
    } else {
      for (int64_t g = begin; g < end; ++g) decode(g, [](int, int) {});
    }
  }

  // Decodes group g of the tiles. Pair p of tile r goes to place(r, p). Stream::ForGroups says what
  // fetch(r, v) is.
  template <int kTiles, bool kFold, class Fetch, class Place>
  static inline __attribute__((always_inline)) void DecodeGroup(const Codec& codec,
                                                                const TileView* tiles, int64_t g,
                                                                Fetch fetch, Place place) {
    for (int r = 0; r < kTiles; ++r) {
      const std::byte* in = tiles[r].codes + g * Geometry::kGroupBytes;
      Unroll<kParts>([&](auto part) {
        [[maybe_unused]] const auto fold = [&] {
          if constexpr (kFold && kScaled)
            return codec.FoldScales(ScalesOf(tiles[r], g * kParts + part));
          else
            return 0;
        }();
        Unroll<kPartVectors>([&](auto vector) {
          constexpr int kVector = part * kPartVectors + vector;
          fetch(r, kVector);
          const auto codes = Isa::LoadCodes(in + kVector * kVectorBytes);
          Unroll<Geometry::kVectorPairs>([&](auto p) {
            Pair* out = place(r, kVector * Geometry::kVectorPairs + p);
            if constexpr (kFold && kScaled) {
              *out = codec.template DecodeFolded<p>(codes, fold);
            } else {
              *out = codec.template Decode<p>(codes);
            }
          });
        });
      });
    }
  }

  // C += A * panel, where the panel's multiplicands are unscaled. The sum of the groups that share
  // scales is scaled as it is added to C. `begin` is the first of such groups. If kFetches, the
  // kernel fetches as PanelKernels do.
  template <int kTokens, int kTiles, bool kFetches>
  static void ScaledPanel(Codec codec, const TileView* tiles, int64_t begin, int64_t end,
                          const Pair* panel, const Activation* a, int64_t to_next, float* c) {
    for (int64_t g = begin; g < end; g += kRun) {
      KeepInMemory();
      Vec part[kTiles][kTokens];
      Clear(part);
      const int64_t pairs =
          Geometry::kGroupPairs * (kRun == 1 ? 1 : std::min<int64_t>(kRun, end - g));
      for (int64_t p = 0; p < pairs; ++p) {
        if constexpr (kFetches) Step::template PrefetchPair<kTokens>(a, p, to_next);
        Step::template AddPair<kTokens, kTiles>(panel, a, p, part);
      }
      panel += pairs * kTiles;
      a += pairs * kTokens * 2;
      AddScaled(codec, tiles, g, part, c);
    }
  }

  // C += sums * their scales, for kRuns successive runs of groups, the first of which begins with
  // group g. A panel unit has left the sums in memory, [kTiles][tokens][16] of a run, `distance`
  // floats after those of the run before.
  template <int kTiles, int kRuns>
  __attribute__((noinline)) static void AddScaled(const Codec& codec, const TileView* tiles,
                                                  int64_t g, int tokens, const float* sums,
                                                  int64_t distance, float* c) {
    for (int r = 0; r < kTiles; ++r) {
      Vec scales[kRuns];
      for (int i = 0; i < kRuns; ++i) {
        scales[i] = codec.GroupScales(ScalesOf(tiles[r], g + i * kRun));
      }
      for (int t = 0; t < tokens; ++t) {
        Vec sum = Isa::Load(c);
        for (int i = 0; i < kRuns; ++i) {
          sum = Isa::Fma(Isa::Load(sums + i * distance), scales[i], sum);
        }
        Isa::Store(c, sum);
        sums += kTileRows;
        c += kTileRows;
      }
    }
  }

 private:
  // C += A * parts [part, part + kCount) of the tiles.
  template <int kCount, int kTokens, int kTiles>
  static inline __attribute__((always_inline)) void FusedParts(const Codec& codec,
                                                               const TileView* tiles, int64_t part,
                                                               const Activation* a, float* c) {
    KeepInMemory();
    Vec sums[kCount][kTiles][kTokens];
    for (auto& sum : sums) Clear(sum);
    AddParts<kCount, kTokens, kTiles>(codec, tiles, part, a, [](int, int) {}, sums);
    for (int i = 0; i < kCount; ++i) AddScaled(codec, tiles, part + i, sums[i], c);
  }

  // sums[i] += A * part `part + i` of the tiles, unscaled. Stream::ForGroups says what fetch(r, v)
  // is.
  template <int kCount, int kTokens, int kTiles, class Fetch>
  static inline __attribute__((always_inline)) void AddParts(const Codec& codec,
                                                             const TileView* tiles, int64_t part,
                                                             const Activation* a, Fetch fetch,
                                                             Vec (&sums)[kCount][kTiles][kTokens]) {
    a += part * kPartDepth * kTokens;
    for (int v = 0; v < kPartVectors; ++v) {
      const auto load = [&](int i, int r) __attribute__((always_inline)) {
        return Isa::LoadCodes(tiles[r].codes + (part + i) * kPartBytes + v * kVectorBytes);
      };
      for (int r = 0; r < kTiles; ++r) {
        for (int i = 0; i < kCount; ++i) fetch(r, i * kPartVectors + v);
      }
      if constexpr (Isa::kSplitsPairs && !kScaled) {
        // Half a pair is decoded at a time, from codes that are read again. The other half would
        // take registers from the sums.
        static_assert(kCount == 1 && Geometry::kVectorPairs == 1);
        Step::template AddHalf<kTokens, kTiles>(
            [&](int r) { return codec.template Decode<0>(load(0, r)).even; }, a, sums[0]);
        KeepInMemory();
        Step::template AddHalf<kTokens, kTiles>(
            [&](int r) { return codec.template Decode<0>(load(0, r)).odd; }, a + 1, sums[0]);
        a += 2 * kTokens;
      } else {
        typename Isa::Codes codes[kCount][kTiles];
        for (int r = 0; r < kTiles; ++r) {
          for (int i = 0; i < kCount; ++i) codes[i][r] = load(i, r);
        }
        Unroll<Geometry::kVectorPairs>([&](auto p) __attribute__((always_inline)) {
          for (int i = 0; i < kCount; ++i) {
            const Activation* x = a + i * kPartDepth * kTokens;
            Pair w[kTiles];
            for (int r = 0; r < kTiles; ++r) w[r] = codec.template Decode<p>(codes[i][r]);
            for (int t = 0; t < kTokens; ++t) {
              for (int r = 0; r < kTiles; ++r)
                sums[i][r][t] = Isa::Dot(sums[i][r][t], w[r], x + 2 * t);
            }
          }
          a += 2 * kTokens;
        });
      }
    }
  }

  template <int kTokens, int kTiles>
  static void Clear(Vec (&part)[kTiles][kTokens]) {
    for (auto& row : part) {
      for (Vec& sum : row) sum = Isa::Zero();
    }
  }

  // C += sums * the scales of part `part`. The sums are in registers.
  template <int kTokens, int kTiles>
  static inline __attribute__((always_inline)) void AddScaled(Codec codec, const TileView* tiles,
                                                              int64_t part,
                                                              Vec (&sums)[kTiles][kTokens],
                                                              float* c) {
    for (int r = 0; r < kTiles; ++r) {
      const Vec scales = codec.GroupScales(ScalesOf(tiles[r], part));
      for (int t = 0; t < kTokens; ++t) {
        float* out = SumsAt(c, r, t, kTokens);
        Isa::Store(out, Isa::Fma(sums[r][t], scales, Isa::Load(out)));
      }
    }
  }
};

}  // namespace cpumoe
