// The digit path: exact integer weights times activations of 14 or 21 bits, multiplied as bytes
// (kernels/digit_gemm-inl.h).
//
// It is the default path where bytes are multiplied faster than floating point numbers: for few
// tokens, and with VPDPBUSD for any number. There it is one half of a mixed path
// (mixed_path-inl.h). It is a path of its own for fp32 calls on ISAs whose floating point kernels
// would round activations to bf16.
//
// A block of tokens is staged as [group][token].
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/bits.h"
#include "base/float_types.h"
#include "kernels/digit_gemm-inl.h"
#include "kernels/limits-inl.h"
#include "kernels/product.h"
#include "kernels/token_blocks.h"
#include "paths/byte_codec-inl.h"
#include "staging/staging.h"

namespace cpumoe {

template <class Isa, class FloatCodec>
class DigitPath {
  using Codec = ByteCodec<Isa, FloatCodec>;
  using Gemm = DigitGemm<Isa, Codec>;
  using Group = DigitGroup;
  static_assert(kLeastDigitUnit * Codec::kUnit > 0.0f);
  static_assert(DigitIsa<Isa>, "an ISA that multiplies digits must say how their sums are added");

 public:
  static constexpr int kFewTokenLimit = kAnyTokens;
  static constexpr int kMostFewTokens = kAnyTokens;
  static constexpr int kBlockTokens = kStreamedTokens;
  static constexpr int kFeatureTiles =
      kGroupSize / kTileRows;  // tiles of a group, which is rounded as a whole
  static_assert(kGroupSize % kTileRows == 0);
  static constexpr int64_t kPanelBytes = 0;

  static int64_t Dots(int64_t rounds) { return Limits<Isa>::QuadDots(rounds) / kFewDigits; }

  static int TilesAtOnce(StagedForm, const TokenBlocks&) { return TilePair::kCount; }

  static StagedForm FormFor(DType, int64_t /*tokens*/, int /*few_token_limit*/) {
    return StagedForm::kBytes;
  }

  static int64_t StagedBytes(StagedForm, int64_t columns) {
    return cpumoe::GroupsOf(columns) * static_cast<int64_t>(sizeof(Group));
  }

  static void StageRows(StagedForm, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    ByteStaging<Isa>::DigitRows(kByteWeights<Codec>, dtype, x, row_stride, token, tokens, columns,
                                block);
  }

  static void StageFeatures(StagedForm, DType dtype, const float* h, int64_t first, int t,
                            int tokens, int64_t /*columns*/, std::byte* block) {
    ByteStaging<Isa>::DigitFeatures(kByteWeights<Codec>, dtype, h, first, t, tokens, block);
  }

  static void Multiply(const FloatCodec&, std::span<const TilePair> w, StagedForm,
                       const std::byte* staged, std::byte* /*panel*/, const Product& c) {
    const TokenBlocks& blocks = c.blocks();
    const int64_t groups = w[0].groups;
    c.Clear(std::ssize(w));
    // The pairs take turns at kTurnGroups groups each, so that the activations of these groups stay
    // in L2.
    const int64_t turn = blocks.tokens() > kStreamedTokens ? kTurnGroups : groups;
    const int64_t rounds = CeilDiv(blocks.count(), int64_t{kMostAtOnce / blocks.Size(0)});
    const int64_t blocks_at_once = CeilDiv(blocks.count(), rounds);
    for (int64_t first = 0; first < blocks.count(); first += blocks_at_once) {
      const int64_t last = std::min(first + blocks_at_once, blocks.count());
      for (int64_t begin = 0; begin < groups; begin += turn) {
        for (int64_t pair = 0; pair < std::ssize(w); ++pair) {
          std::array<typename Gemm::Token, kMostAtOnce> tokens;
          TilePair tiles = w[pair];
          if (turn < groups) {  // the next tile belongs to another turn
            for (TileView& tile : tiles.tiles) tile.next = nullptr;
          }
          const int count = ListTokens(c, pair, first, last, groups, staged, tokens.data());
          Gemm::Run(Codec{}, tiles, begin, std::min(begin + turn, groups),
                    std::span(tokens.data(), count));
        }
      }
    }
  }

 private:
  static constexpr int kMostAtOnce = 128;  // most tokens for which a group is decoded only once
  static_assert(Isa::kPanelTokens <= kMostAtOnce && kBlockTokens <= kMostAtOnce);
  static constexpr int64_t kTurnGroups = 16;

  // Lists the tokens of blocks [first, last), with their groups and with their sums for one pair.
  static int ListTokens(const Product& c, int64_t pair, int64_t first, int64_t last, int64_t groups,
                        const std::byte* staged, typename Gemm::Token* tokens) {
    int count = 0;
    for (int64_t b = first; b < last; ++b) {
      const int size = c.blocks().Size(b);
      const Group* group = GroupsOf(staged) + c.blocks().Begin(b) * groups;
      float* out = c.At(pair, b);
      for (int t = 0; t < size; ++t, ++count) {
        tokens[count] = {group + t, size, {SumsAt(out, 0, t, size), SumsAt(out, 1, t, size)}};
      }
    }
    return count;
  }

  static const Group* GroupsOf(const std::byte* block) {
    return reinterpret_cast<const Group*>(block);
  }
};

}  // namespace cpumoe
