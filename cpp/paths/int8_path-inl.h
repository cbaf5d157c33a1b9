// The int8 path: exact integer weights times activations rounded to int8, for formats whose codes
// are integers times a unit (path.h says what a path is).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/limits-inl.h"
#include "kernels/product.h"
#include "kernels/quad_gemm-inl.h"
#include "kernels/token_blocks.h"
#include "paths/byte_codec-inl.h"
#include "staging/staging.h"

namespace cpumoe {

template <class Isa, class FloatCodec>
class Int8Path {
  using Codec = ByteCodec<Isa, FloatCodec>;
  using Gemm = QuadGemm<Isa, Codec>;

 public:
  static constexpr int kFewTokenLimit = 0;  // not used: the number of blocks decides
  static constexpr int kMostFewTokens = 0;
  static constexpr int kBlockTokens = Isa::kQuadTokens;
  static constexpr int kFeatureTiles =
      kGroupSize / kTileRows;  // tiles of a group, which is rounded as a whole
  static_assert(kGroupSize % kTileRows == 0);
  static constexpr int64_t kPanelBytes = Gemm::kPanelBytes;

  static int64_t Dots(int64_t rounds) { return Limits<Isa>::QuadDots(rounds); }

  static int TilesAtOnce(StagedForm, const TokenBlocks& blocks) {
    return Gemm::TilesAtOnce(blocks);
  }

  static int64_t StagedBytes(StagedForm, int64_t columns) {
    return QuadBlock::BytesPerToken(PaddedColumns(columns), kGroupSize);
  }

  // The kernels for few and for many tokens read one staged form and give bit-identical results.
  // The number of blocks decides between them.
  static StagedForm FormFor(DType, int64_t /*tokens*/, int /*few_token_limit*/) {
    return StagedForm::kPanel;
  }

  static void StageRows(StagedForm, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    ByteStaging<Isa>::QuadRows(kByteWeights<Codec>, dtype, x, row_stride, token, tokens, columns,
                               block);
  }

  static void StageFeatures(StagedForm, DType, const float* h, int64_t first, int t, int tokens,
                            int64_t columns, std::byte* block) {
    ByteStaging<Isa>::QuadFeatures(kByteWeights<Codec>, h, first, t, tokens, columns, block);
  }

  // Multiplies pair by pair. One-byte activations fit the L2 cache for as many tokens as matter, so
  // the pairs need not take turns.
  static void Multiply(const FloatCodec&, std::span<const TilePair> w, StagedForm,
                       const std::byte* staged, std::byte* panel, const Product& c) {
    for (int64_t pair = 0; pair < std::ssize(w); ++pair) {
      Gemm::Run(Codec{}, w[pair], staged, panel, c.Pair(pair));
    }
  }
};

}  // namespace cpumoe
