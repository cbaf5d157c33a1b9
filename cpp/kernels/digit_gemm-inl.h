// C = A * W^T in bytes, but with 14 or 21 bits: the digit path's micro-kernel.
//
// An instruction multiplies four times as many bytes as fp32, and a 4-bit code becomes a byte with
// less work than any floating point number. So a group of activations is written as integers times
// a power of two (DigitGroup), and the integers as two or three signed digits of base 128, whose
// products with the weights' bytes are summed apart:
//
//   x = scale (q0 128^2 + q1 128 + q2)              weight = w - offset, 0 <= w < 128
//   sum weight x = scale (S0 128^2 + S1 128 + S2 + start),  Si = sum w qi
//
// How many digits a group has is decided when it is staged (packing/digits-inl.h). The branch costs
// next to nothing: every row of the matrix meets a token's groups in the same order.
//
// Everything is an exact integer of 32 bits up to there, and the Si of a whole group's every other
// product fit 16 bits: ISAs without VPDPBUSD sum products of VPMADDUBSW as they come.
//
// A group is decoded once for all tokens; then a token at a time is multiplied.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/gemm-inl.h"
#include "kernels/quad_gemm-inl.h"
#include "kernels/tile.h"

namespace cpumoe {

inline constexpr int kFewDigits = 2;  // digits of a group: these or kMostDigits
inline constexpr int kMostDigits = 3;
inline constexpr int kDigitBits = 7;
inline constexpr int kMaxDigit = 64;  // of a digit's magnitude

// An integer's magnitude is at most two to this power.
constexpr int IntegerBits(int digits) { return digits * kDigitBits - 1; }

// A group of a token's activations.
template <int kGroupSize>
struct DigitGroup {
  int8_t digits[kMostDigits][kGroupSize];  // most significant first; fours in the order kQuadOrder
  float scale;    // what an integer product is worth before the weights' scales
  int32_t start;  // minus the bytes' offset times the sum of the integers
  int32_t count;  // digits in use
};

// Whether a group's sums fit: those of a digit 16 bits, in which an ISA may sum every other
// product, and all of them 32 bits, of which a 64th is left for the lower digits.
template <class Codec>
constexpr bool DigitsFit() {
  constexpr int64_t kGroupSize = Codec::Format::kGroupSize;
  constexpr int64_t kDigitSum = kGroupSize * Codec::kGreatest * kMaxDigit;
  constexpr int64_t kStart = (kGroupSize * Codec::kOffset) << IntegerBits(kMostDigits);
  return kDigitSum / 2 <= INT16_MAX &&
         (kDigitSum << (kMostDigits - 1) * kDigitBits) + kStart <= int64_t{INT32_MAX} / 64 * 63;
}

template <class Isa, class Codec>
class DigitGemm {
  static_assert(QuadCodec<Codec, Isa> && DigitsFit<Codec>());
  using Format = typename Codec::Format;
  using Geometry = TileGeometry<Format::kCodeBits, Format::kGroupSize>;
  using Scale = typename Format::Scale;
  using Quad = typename Isa::Quad;
  using Vec = typename Isa::Vec;
  using Tiles = Stream<Geometry, Scale>;
  static constexpr int kTiles = Isa::kTiles;

 public:
  using Group = DigitGroup<Format::kGroupSize>;

  struct Token {
    const Group* groups;
    int64_t stride;                          // from a group to the next
    std::array<float*, TilePair::kCount> c;  // [16] of either tile
  };

  // token.c += activations * tiles^T of every token, groups [begin, end). Both tiles are read side
  // by side, because memory delivers two streams faster than one.
  static void Run(const Codec& codec, const TilePair& w, int64_t begin, int64_t end,
                  std::span<const Token> tokens) {
    if (tokens.size() == 1) {
      Multiply<true>(codec, w, begin, end, tokens);
    } else {
      Multiply<false>(codec, w, begin, end, tokens);
    }
  }

 private:
  template <bool kLone>
  __attribute__((flatten)) static void Multiply(Codec codec, const TilePair& w, int64_t begin,
                                                int64_t end, std::span<const Token> tokens) {
    Tiles::template ForGroups<TilePair::kCount>(
        w.tiles.data(), begin, end, w.groups, [&](int64_t g) __attribute__((always_inline)) {
          Unroll<TilePair::kCount / kTiles>([&](auto i) __attribute__((always_inline)) {
            MultiplyGroup<kLone>(codec, &w.tiles[i * kTiles], i * kTiles, g, tokens);
          });
        });
  }

  // Group g of tiles [first, first + kTiles) of a pair. A lone token's weights are decoded where
  // they are multiplied.
  template <bool kLone>
  static inline __attribute__((always_inline)) void MultiplyGroup(const Codec& codec,
                                                                  const TileView* tiles, int first,
                                                                  int64_t g,
                                                                  std::span<const Token> tokens) {
    Vec scales[kTiles];
    const std::byte* codes[kTiles];
    for (int r = 0; r < kTiles; ++r) {
      scales[r] =
          codec.GroupScales(reinterpret_cast<const Scale*>(tiles[r].scales) + g * kTileRows);
      codes[r] = tiles[r].codes + g * Geometry::kGroupBytes;
    }
    const auto decode = [&](auto q, int r) __attribute__((always_inline)) {
      constexpr int kVector = q / Geometry::kVectorQuads;
      return codec.template DecodeQuad<q % Geometry::kVectorQuads>(
          Isa::LoadCodes(codes[r] + kVector * kVectorBytes));
    };
    if constexpr (kLone) {
      AddGroup(tokens[0], first, g, scales, decode);
    } else {
      Quad quads[Geometry::kGroupQuads][kTiles];
      Unroll<Geometry::kGroupQuads>([&](auto q) {
        for (int r = 0; r < kTiles; ++r) quads[q][r] = decode(q, r);
      });
      for (const Token& token : tokens) {
        AddGroup(token, first, g, scales,
                 [&](auto q, int r) __attribute__((always_inline)) { return quads[q][r]; });
      }
    }
  }

  // token.c += the product with group g of the tiles, whose quads are quad_at(quad, tile).
  template <class QuadAt>
  static inline __attribute__((always_inline)) void AddGroup(const Token& token, int first,
                                                             int64_t g, const Vec (&scales)[kTiles],
                                                             QuadAt quad_at) {
    if (token.groups[g * token.stride].count == kFewDigits) {
      AddDigits<kFewDigits>(token, first, g, scales, quad_at);
    } else {
      AddDigits<kMostDigits>(token, first, g, scales, quad_at);
    }
  }

  template <int kDigits, class QuadAt>
  static inline __attribute__((always_inline)) void AddDigits(const Token& token, int first,
                                                              int64_t g,
                                                              const Vec (&scales)[kTiles],
                                                              QuadAt quad_at) {
    const Group& x = token.groups[g * token.stride];
    typename Isa::QuadSum sum[kTiles][kDigits];
    for (int r = 0; r < kTiles; ++r) {
      for (int p = 0; p < kDigits; ++p) {
        const bool starts = p == kDigits - 1 && !kHasNarrowQuadSums<Isa>;
        sum[r][p] = Isa::StartSum(starts ? x.start : 0);
      }
    }
    Unroll<Geometry::kGroupQuads>([&](auto q) {
      Quad w[kTiles];
      for (int r = 0; r < kTiles; ++r) w[r] = quad_at(q, r);
      for (int p = 0; p < kDigits; ++p) {
        for (int r = 0; r < kTiles; ++r) {
          sum[r][p] = Isa::DotQuad(sum[r][p], w[r], x.digits[p] + q * kQuadDepth);
        }
      }
    });
    const Vec scale = Isa::Broadcast(x.scale);
    for (int r = 0; r < kTiles; ++r) {
      const Vec value = Isa::template FinishDigits<kDigitBits>(sum[r], x.start);
      float* out = token.c[first + r];
      Isa::Store(out, Isa::Fma(Isa::Mul(value, scale), scales[r], Isa::Load(out)));
    }
  }
};

}  // namespace cpumoe
