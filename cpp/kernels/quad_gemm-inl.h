// The micro-kernels of the int8 path and their driver: C = A * W^T with A in int8. They are written
// once, in the vocabulary of isa.h.
//
//   A  a block of staged tokens: int8 quads, and per group a scale and a start value (QuadBlock)
//   W  packed tiles of 16 rows x K (tile.h), decoded to unsigned bytes w = integer + offset
//   C  fp32, one pair of a Product
//
// A group's sum of integer * a is exact. It is the sum of w * a plus the group's "start", which is
// minus offset times the sum of a. The sum is converted to fp32 once, multiplied by the token's
// scale and by the 16 weight scales, and added to C. Sums of 16 bits may overflow on the way, but
// they wrap around, and the final sum fits.
//
// The fused kernel decodes bytes in registers, for as many tokens as registers hold. The panel
// kernel decodes bytes to memory (L1/L2) once for all blocks of tokens. Both give bit-identical
// results.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/gemm-inl.h"
#include "kernels/isa.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

// A codec that turns a packed tile into unsigned bytes on an ISA.
template <class C, class Isa>
concept QuadCodec = ByteIsa<Isa> && requires(const C codec, typename Isa::Codes codes,
                                             const typename C::Format::Scale* scales) {
  { C::kGreatest } -> std::convertible_to<int>;  // the greatest byte
  { C::kOffset } -> std::convertible_to<int>;    // byte - offset is the weight's integer
  { C::kUnit } -> std::convertible_to<float>;    // integer * unit is the weight before scaling
  { codec.template DecodeQuad<0>(codes) } -> std::same_as<typename Isa::Quad>;
  { codec.GroupScales(scales) } -> std::same_as<typename Isa::Vec>;
};

inline constexpr int kMaxQuadValue = 127;  // greatest magnitude of a staged activation

// Whether an ISA's sums can hold a group's products with activations of magnitude up to `greatest`.
template <class Isa, class Codec>
constexpr bool QuadSumsFit(int64_t greatest) {
  constexpr int64_t kInteger = std::max(Codec::kOffset, Codec::kGreatest - Codec::kOffset);
  constexpr int kSums = kHasNarrowQuadSums<Isa> ? 2 : 1;
  return kGroupSize / kSums * kInteger * greatest <= Isa::kQuadSumLimit;
}

// Returns the start of a group's sums: minus the bytes' `offset` times the sum of `quads`,
// [kGroupSize] in the order kQuadOrder. For sums of 16 bits the result is two words, one for each
// half of the quads.
template <class Isa>
int32_t StartOf(int offset, const int8_t* quads) {
  int32_t halves[2] = {};
  for (int i = 0; i < kGroupSize; ++i) halves[i % kQuadDepth / 2] += quads[i];
  const int32_t first = -offset * halves[0], second = -offset * halves[1];
  if constexpr (!kHasNarrowQuadSums<Isa>) return first + second;
  return static_cast<int32_t>(static_cast<uint32_t>(second) << 16 | (first & 0xffff));
}

// A block of staged tokens. Its quads, scales and starts follow one another in memory.
struct QuadBlock {
  const int8_t* quads;  // [K/4][tokens][4] in the order kQuadOrder
  // [groups][tokens]: the value of an integer product before the weights' scales.
  const float* scales;
  const int32_t* starts;  // [groups][tokens], from StartOf

  static constexpr int64_t BytesPerToken(int64_t columns, int group_size) {
    return columns + columns / group_size * int64_t{sizeof(float) + sizeof(int32_t)};
  }
  static QuadBlock At(const std::byte* block, int tokens, int64_t columns, int group_size) {
    const auto* scales = reinterpret_cast<const float*>(block + columns * tokens);
    return {reinterpret_cast<const int8_t*>(block), scales,
            reinterpret_cast<const int32_t*>(scales + columns / group_size * tokens)};
  }
};

template <class Isa, class Codec>
class QuadGemm {
  static_assert(QuadCodec<Codec, Isa>);
  using Format = typename Codec::Format;
  using Geometry = TileGeometry<Format::kCodeBits>;
  using Scale = typename Format::Scale;
  using Quad = typename Isa::Quad;
  using Vec = typename Isa::Vec;
  static constexpr int kTiles = Isa::kTiles;

  static_assert(QuadSumsFit<Isa, Codec>(kMaxQuadValue),
                "groups of activations would have to be shorter than the weights'");

 public:
  static_assert(kTiles <= TilePair::kCount);
  static constexpr int kPanelGroups = 64;
  static constexpr int64_t kPanelBytes =
      int64_t{kPanelGroups} * Geometry::kGroupQuads * kTiles * static_cast<int64_t>(sizeof(Quad));

  // How many tiles are read side by side. Memory delivers two streams faster than one.
  static int TilesAtOnce(const TokenBlocks& blocks) {
    return blocks.count() == 1 ? TilePair::kCount : kTiles;
  }

  // c = A * tiles^T for one pair. `panel` is scratch memory of kPanelBytes, `staged` is the memory
  // of the first block.
  static void Run(const Codec& codec, const TilePair& w, const std::byte* staged, std::byte* panel,
                  const Product& c) {
    const TokenBlocks& blocks = c.blocks();
    c.Clear(1);
    if (blocks.count() == 1) {
      const Span all = {w.tiles.data(), nullptr, 0, w.groups, w.groups};
      kFused[blocks.Size(0) - 1](codec, all, BlockAt(w, blocks, 0, staged), c.At(0, 0));
      return;
    }
    auto* quads = reinterpret_cast<Quad*>(panel);
    for (int first = 0; first < TilePair::kCount; first += kTiles) {
      for (int64_t begin = 0; begin < w.groups; begin += kPanelGroups) {
        const int64_t end = std::min<int64_t>(begin + kPanelGroups, w.groups);
        const Span span = {&w.tiles[first], quads, begin, end, w.groups};
        DecodePanel(codec, span, quads);
        for (int64_t b = 0; b < blocks.count(); ++b) {
          kPanel[blocks.Size(b) - kFewestOfSeveral](codec, span, BlockAt(w, blocks, b, staged),
                                                    c.At(0, b, first));
        }
      }
    }
  }

 private:
  // Groups [begin, end) of TilesAtOnce tiles that have `groups` groups. `panel` is null if the
  // groups are decoded in registers.
  struct Span {
    const TileView* tiles;
    const Quad* panel;  // [group][quad][tile]
    int64_t begin, end, groups;
  };
  using Tiles = Stream<Geometry, Scale>;

  static QuadBlock BlockAt(const TilePair& w, const TokenBlocks& blocks, int64_t b,
                           const std::byte* staged) {
    const int64_t columns = w.groups * kGroupSize;
    const int64_t bytes = QuadBlock::BytesPerToken(columns, kGroupSize);
    return QuadBlock::At(staged + blocks.Begin(b) * bytes, blocks.Size(b), columns, kGroupSize);
  }

  __attribute__((flatten)) static void DecodePanel(const Codec& codec, const Span& span,
                                                   Quad* out) {
    Tiles::template ForGroups<kTiles>(
        span.tiles, span.begin, span.end, span.groups,
        [&](int64_t g, auto) __attribute__((always_inline)) {
          for (int r = 0; r < kTiles; ++r) {
            const std::byte* in = span.tiles[r].codes + g * Geometry::kGroupBytes;
            Quad* quads = out + (g - span.begin) * Geometry::kGroupQuads * kTiles + r;
            Unroll<Geometry::kGroupVectors>([&](auto v) __attribute__((always_inline)) {
              const auto codes = Isa::LoadCodes(in + v * kVectorBytes);
              Unroll<Geometry::kVectorQuads>([&](auto q) __attribute__((always_inline)) {
                quads[(v * Geometry::kVectorQuads + q) * kTiles] =
                    codec.template DecodeQuad<q>(codes);
              });
            });
          }
        });
  }

  // c[tile][token][16] += the span's product.
  template <int kTokens, bool kDecoded>
  __attribute__((flatten)) static void Multiply(Codec codec, Span span, QuadBlock a, float* c) {
    const int8_t* x = a.quads + span.begin * kGroupSize * kTokens;
    if constexpr (kDecoded) {
      for (int64_t g = span.begin; g < span.end; ++g, x += kGroupSize * kTokens) {
        AddGroup<kTokens, kDecoded>(codec, span, span.tiles, g, a, x, c);
      }
    } else {
      Tiles::template ForGroups<TilePair::kCount>(
          span.tiles, span.begin, span.end, span.groups,
          [&](int64_t g, auto) __attribute__((always_inline)) {
            Unroll<TilePair::kCount / kTiles>([&](auto i) __attribute__((always_inline)) {
              AddGroup<kTokens, kDecoded>(codec, span, span.tiles + i * kTiles, g, a, x,
                                          SumsAt(c, i * kTiles, 0, kTokens));
            });
            x += kGroupSize * kTokens;
          });
    }
  }

  // Adds the products of group g of kTiles tiles. `x` are the group's quads of activations.
  template <int kTokens, bool kDecoded>
  static inline __attribute__((always_inline)) void AddGroup(const Codec& codec, const Span& span,
                                                             const TileView* tiles, int64_t g,
                                                             const QuadBlock& a, const int8_t* x,
                                                             float* c) {
    KeepInMemory();
    const int32_t* starts = a.starts + g * kTokens;
    typename Isa::QuadSum sum[kTiles][kTokens];
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kTiles; ++r) sum[r][t] = Isa::StartSum(starts[t]);
    }
    Unroll<Geometry::kGroupVectors>([&](auto v) __attribute__((always_inline)) {
      AddVector<kTokens, kDecoded, v>(codec, span, tiles, g, x, sum);
    });
    for (int r = 0; r < kTiles; ++r) {
      const auto* scales = reinterpret_cast<const Scale*>(tiles[r].scales);
      const Vec weight_scales = codec.GroupScales(scales + g * kTileRows);
      for (int t = 0; t < kTokens; ++t) {
        const Vec scale = Isa::Broadcast(a.scales[g * kTokens + t]);
        const Vec value = Isa::FinishSum(sum[r][t]);
        float* out = SumsAt(c, r, t, kTokens);
        Isa::Store(out, Isa::Fma(Isa::Mul(value, scale), weight_scales, Isa::Load(out)));
      }
    }
  }

  // Adds the products of vector kVector of group g.
  template <int kTokens, bool kDecoded, int kVector>
  static inline __attribute__((always_inline)) void AddVector(
      const Codec& codec, const Span& span, const TileView* tiles, int64_t g, const int8_t* x,
      typename Isa::QuadSum (&sum)[kTiles][kTokens]) {
    [[maybe_unused]] typename Isa::Codes codes[kTiles];
    if constexpr (!kDecoded) {
      for (int r = 0; r < kTiles; ++r) {
        codes[r] =
            Isa::LoadCodes(tiles[r].codes + g * Geometry::kGroupBytes + kVector * kVectorBytes);
      }
    }
    Unroll<Geometry::kVectorQuads>([&](auto q) __attribute__((always_inline)) {
      constexpr int kQuad = kVector * Geometry::kVectorQuads + q;
      Quad w[kTiles];
      for (int r = 0; r < kTiles; ++r) {
        if constexpr (kDecoded) {
          w[r] = span.panel[((g - span.begin) * Geometry::kGroupQuads + kQuad) * kTiles + r];
        } else {
          w[r] = codec.template DecodeQuad<q>(codes[r]);
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < kTiles; ++r) {
          sum[r][t] = Isa::DotQuad(sum[r][t], w[r], x + (kQuad * kTokens + t) * kQuadDepth);
        }
      }
    });
  }

  // Tables of kernels by number of tokens. The panel kernel gets one of several blocks, so its
  // table begins with kFewestOfSeveral.
  static constexpr int kFewestOfSeveral = TokenBlocks::FewestOfSeveral(Isa::kQuadTokens);
  using Kernel = void (*)(Codec, Span, QuadBlock, float*);
  template <bool kDecoded, int kFewest, int... n>
  static constexpr auto Table(std::integer_sequence<int, n...>) {
    return std::array<Kernel, sizeof...(n)>{&Multiply<kFewest + n, kDecoded>...};
  }
  static constexpr auto kFused =
      Table<false, 1>(std::make_integer_sequence<int, Isa::kQuadTokens>{});
  static constexpr auto kPanel = Table<true, kFewestOfSeveral>(
      std::make_integer_sequence<int, Isa::kQuadTokens - kFewestOfSeveral + 1>{});
};

}  // namespace cpumoe
