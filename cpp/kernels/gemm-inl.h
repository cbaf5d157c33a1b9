// The micro-kernels of the floating point path: C = A * W^T for a few tiles of W. They are written
// once, in the vocabulary of isa.h.
//
//   A  tokens x K, staged: [K/2][tokens][2] of Isa::Activation (a pair is one broadcast; a panel
//      unit may want another step than 2)
//   W  packed tiles of 16 rows x K (tile.h)
//   C  [tiles][tokens][16] fp32
//
// The fused kernel decodes codes in registers and multiplies each multiplicand with all tokens at
// once. It sums the products of the groups that share scales unscaled, and one multiply-add applies
// the 16 scales. It takes as many tokens as registers hold.
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
template <class Geometry, class Scale, int kRun = 1>
struct Stream {
  static constexpr int64_t kScaleBytes = kTileRows * kBytesOfScale<Scale>;  // of kRun groups

  // Calls body(g) for the groups [begin, end) of kTiles tiles, kStep groups at a time. Each tile
  // has `groups` groups. Either all tiles know which tile follows them, or none does (LinkTiles
  // with kTiles tiles at once).
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
        for (int r = 0; r < kTiles; ++r) FetchCodes<kStep>(tiles[r].codes + ahead[r], g);
        FetchScales<kTiles, kStep>(tiles, g, groups);
        body(g);
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
  using Scale = typename Format::Scale;
  using Activation = typename Isa::Activation;
  using Pair = typename Isa::Pair;
  using Vec = typename Isa::Vec;

  static constexpr int kRun = kPackedDepthOf<Format> / kGroupSize;  // groups that share scales
  static_assert(kPackedDepthOf<Format> % kGroupSize == 0);

  using Step = PanelStep<Isa>;
  using Tiles = Stream<Geometry, Scale, kRun>;

  static constexpr bool kScaled = HasScales<Format>;
  static constexpr bool kFolding = !kScaled || FoldingCodec<Codec, Isa>;
  static constexpr int kPanelGroups = Isa::kPanelPairs / Geometry::kGroupPairs;
  static_assert(Isa::kPanelPairs % Geometry::kGroupPairs == 0 && kPanelGroups % kRun == 0);

  static const Scale* ScalesOf(const TileView& tile, int64_t group) {
    return reinterpret_cast<const Scale*>(tile.scales) + group / kRun * kTileRows;
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
        Tiles::template ForGroups<kTiles>(tiles, run, std::min<int64_t>(run + kRun, groups), groups,
                                          [&](int64_t g) __attribute__((always_inline)) {
                                            AddGroups<1, kTokens, kTiles>(codec, tiles, g, a, sum);
                                          });
        AddScaled(codec, tiles, run, sum[0], c);
      }
    } else if constexpr (kScaled) {
      // A sum is a chain of dependent instructions. With few sums, two groups are summed at once.
      constexpr int kAtOnce = kTiles * kTokens <= 2 ? 2 : 1;
      for (int i = 0; i < kTiles * kTokens; ++i) Isa::Store(c + i * kTileRows, Isa::Zero());
      const int64_t whole = groups / kAtOnce * kAtOnce;
      Tiles::template ForGroups<kTiles, kAtOnce>(
          tiles, 0, whole, groups, [&](int64_t g) __attribute__((always_inline)) {
            FusedGroups<kAtOnce, kTokens, kTiles>(codec, tiles, g, a, c);
          });
      if (whole < groups) FusedGroups<1, kTokens, kTiles>(codec, tiles, whole, a, c);
    } else {
      // Sums stay in registers over the whole of K.
      Vec sum[1][kTiles][kTokens];
      Clear(sum[0]);
      Tiles::template ForGroups<kTiles>(tiles, 0, groups, groups,
                                        [&](int64_t g) __attribute__((always_inline)) {
                                          AddGroups<1, kTokens, kTiles>(codec, tiles, g, a, sum);
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
    const auto decode = [&](int64_t g) __attribute__((always_inline)) {
      DecodeGroup<kTiles, kFold>(codec, tiles, g,
                                 [panel](int r, int p) { return panel + p * kTiles + r; });
      panel += Geometry::kGroupPairs * kTiles;
    };
    if (streams) {
      Tiles::template ForGroups<kTiles>(tiles, begin, end, groups, decode);
    } else {
      for (int64_t g = begin; g < end; ++g) decode(g);
    }
  }

  // Decodes group g of the tiles. Pair p of tile r goes to place(r, p).
  template <int kTiles, bool kFold, class Place>
  static inline __attribute__((always_inline)) void DecodeGroup(const Codec& codec,
                                                                const TileView* tiles, int64_t g,
                                                                Place place) {
    for (int r = 0; r < kTiles; ++r) {
      const std::byte* in = tiles[r].codes + g * Geometry::kGroupBytes;
      [[maybe_unused]] const auto fold = [&] {
        if constexpr (kFold && kScaled)
          return codec.FoldScales(ScalesOf(tiles[r], g));
        else
          return 0;
      }();
      Unroll<Geometry::kGroupVectors>([&](auto v) {
        const auto codes = Isa::LoadCodes(in + v * kVectorBytes);
        Unroll<Geometry::kVectorPairs>([&](auto p) {
          Pair* out = place(r, v * Geometry::kVectorPairs + p);
          if constexpr (kFold && kScaled) {
            *out = codec.template DecodeFolded<p>(codes, fold);
          } else {
            *out = codec.template Decode<p>(codes);
          }
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

  // C += part * the scales of group g. The products `part` were left in memory by a panel unit.
  template <int kTiles>
  static void AddScaled(Codec codec, const TileView* tiles, int64_t g, int tokens,
                        const float* part, float* c) {
    for (int r = 0; r < kTiles; ++r) {
      const Vec scales = codec.GroupScales(ScalesOf(tiles[r], g));
      for (int64_t i = 0; i < int64_t{tokens} * kTileRows; i += kTileRows) {
        Isa::Store(c + i, Isa::Fma(Isa::Load(part + i), scales, Isa::Load(c + i)));
      }
      part += tokens * kTileRows;
      c += tokens * kTileRows;
    }
  }

 private:
  // C += A * groups [g, g + kGroups) of the tiles.
  template <int kGroups, int kTokens, int kTiles>
  static inline __attribute__((always_inline)) void FusedGroups(const Codec& codec,
                                                                const TileView* tiles, int64_t g,
                                                                const Activation* a, float* c) {
    KeepInMemory();
    Vec part[kGroups][kTiles][kTokens];
    for (auto& group : part) Clear(group);
    AddGroups<kGroups, kTokens, kTiles>(codec, tiles, g, a, part);
    for (int i = 0; i < kGroups; ++i) AddScaled(codec, tiles, g + i, part[i], c);
  }

  // part[i] += A * group g + i of the tiles, unscaled.
  template <int kGroups, int kTokens, int kTiles>
  static inline __attribute__((always_inline)) void AddGroups(
      const Codec& codec, const TileView* tiles, int64_t g, const Activation* a,
      Vec (&part)[kGroups][kTiles][kTokens]) {
    a += g * kGroupSize * kTokens;
    for (int v = 0; v < Geometry::kGroupVectors; ++v) {
      typename Isa::Codes codes[kGroups][kTiles];
      for (int r = 0; r < kTiles; ++r) {
        const std::byte* at = tiles[r].codes + g * Geometry::kGroupBytes + v * kVectorBytes;
        for (int i = 0; i < kGroups; ++i) {
          codes[i][r] = Isa::LoadCodes(at);
          at += Geometry::kGroupBytes;
        }
      }
      Unroll<Geometry::kVectorPairs>([&](auto p) __attribute__((always_inline)) {
        for (int i = 0; i < kGroups; ++i) {
          const Activation* x = a + i * kGroupSize * kTokens;
          Pair w[kTiles];
          for (int r = 0; r < kTiles; ++r) w[r] = codec.template Decode<p>(codes[i][r]);
          for (int t = 0; t < kTokens; ++t) {
            for (int r = 0; r < kTiles; ++r)
              part[i][r][t] = Isa::Dot(part[i][r][t], w[r], x + 2 * t);
          }
        }
        a += 2 * kTokens;
      });
    }
  }

  template <int kTokens, int kTiles>
  static void Clear(Vec (&part)[kTiles][kTokens]) {
    for (auto& row : part) {
      for (Vec& sum : row) sum = Isa::Zero();
    }
  }

  // C += part * the scales of group g. The products `part` are in registers.
  template <int kTokens, int kTiles>
  static inline __attribute__((always_inline)) void AddScaled(Codec codec, const TileView* tiles,
                                                              int64_t g,
                                                              Vec (&part)[kTiles][kTokens],
                                                              float* c) {
    for (int r = 0; r < kTiles; ++r) {
      const Vec scales = codec.GroupScales(ScalesOf(tiles[r], g));
      for (int t = 0; t < kTokens; ++t) {
        float* out = SumsAt(c, r, t, kTokens);
        Isa::Store(out, Isa::Fma(part[r][t], scales, Isa::Load(out)));
      }
    }
  }
};

}  // namespace cpumoe
