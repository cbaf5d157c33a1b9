// The micro-kernel of the digit path: C = A * W^T, multiplied as bytes but with 14 or 21 bits.
//
// An instruction multiplies four times as many bytes as fp32 numbers, and decoding a 4-bit code to
// a byte takes less work than decoding it to a floating point number. Therefore a group of
// activations is held as integers times a power of two (DigitGroup), and each integer as two or
// three signed digits of base 128. The products of each digit with the weights' bytes are summed
// separately:
//
//   x = scale (q0 128^2 + q1 128 + q2)              weight = w - offset, 0 <= w < 128
//   sum weight x = scale (S0 128^2 + S1 128 + S2 + start),  Si = sum w qi
//
// Staging decides how many digits a group has (staging/digits-inl.h). The kernel's branch on this
// number costs next to nothing, because every row of the matrix meets a token's groups in one
// order.
//
// Everything before the multiplication by `scale` is an exact 32-bit integer. A digit's sum over
// half of a group's products fits 16 bits, so ISAs without VPDPBUSD add the 16-bit results of
// VPMADDUBSW as they are.
//
// A group is decoded once for all tokens. Then the tokens are multiplied one at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/gemm-inl.h"
#include "kernels/quad_gemm-inl.h"
#include "kernels/tile.h"

namespace cpumoe {

// The number of digits of a group is kFewDigits or kMostDigits.
inline constexpr int kFewDigits = 2;
inline constexpr int kMostDigits = 3;
inline constexpr int kDigitBits = 7;
inline constexpr int kMaxDigit = 64;  // greatest magnitude of a digit

// An integer of so many digits has a magnitude of at most two to the power of IntegerBits.
constexpr int IntegerBits(int digits) { return digits * kDigitBits - 1; }

// One group of a token's activations, as digits.
struct DigitGroup {
  // Most significant digit first. Four successive digits are in the order kQuadOrder.
  int8_t digits[kMostDigits][kGroupSize];
  float scale;    // the value of an integer product before the weights' scales
  int32_t start;  // minus the bytes' offset times the sum of the integers
  int32_t count;  // the digits in use
};

// Whether a group's sums fit their integers. A digit's sum over half of the products must fit 16
// bits, because an ISA may sum in 16 bits. The sum over all digits must fit 32 bits, of which a
// 64th is reserved for the lower digits.
template <class Codec>
constexpr bool DigitsFit() {
  constexpr int64_t kDigitSum = int64_t{kGroupSize} * Codec::kGreatest * kMaxDigit;
  constexpr int64_t kStart = (int64_t{kGroupSize} * Codec::kOffset) << IntegerBits(kMostDigits);
  return kDigitSum / 2 <= INT16_MAX &&
         (kDigitSum << (kMostDigits - 1) * kDigitBits) + kStart <= int64_t{INT32_MAX} / 64 * 63;
}

template <class Isa, class Codec>
class DigitGemm {
  static_assert(QuadCodec<Codec, Isa> && DigitsFit<Codec>());
  using Format = typename Codec::Format;
  using Geometry = TileGeometry<Format::kCodeBits>;
  using Scale = typename Format::Scale;
  using Quad = typename Isa::Quad;
  using Vec = typename Isa::Vec;
  using Tiles = Stream<Geometry, Scale>;
  static constexpr int kTiles = Isa::kTiles;

 public:
  using Group = DigitGroup;

  struct Token {
    const Group* groups;
    int64_t stride;                          // distance from one group to the next
    std::array<float*, TilePair::kCount> c;  // [16] for each of the two tiles
  };

  // For every token: token.c += activations * tiles^T, over groups [begin, end). Both tiles are
  // read side by side, because memory delivers two streams faster than one.
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
        w.tiles.data(), begin, end, w.groups, [&](int64_t g, auto) __attribute__((always_inline)) {
          Unroll<TilePair::kCount / kTiles>([&](auto i) __attribute__((always_inline)) {
            MultiplyGroup<kLone>(codec, &w.tiles[i * kTiles], i * kTiles, g, tokens);
          });
        });
  }

  // Multiplies group g of tiles [first, first + kTiles) of a pair. For a lone token, weights are
  // decoded right where they are multiplied.
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

  // token.c += the product with group g of the tiles. quad_at(quad, tile) returns the tiles' quads.
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
