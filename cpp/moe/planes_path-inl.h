// Exact activations for a handful of tokens, as bytes: where weights are integers times a unit, and
// one instruction multiplies bytes, this decodes and multiplies with less work than bf16 needs.
//
// A group of activations is written as three planes of int8, x = s q0 + s/254 q1 + s/254^2 q2,
// which leaves about 2^-24 of the group's greatest magnitude: what adding in fp32 loses as well.
// A plane is to the int8 path's kernels a token of its own; the planes' products add up to the
// token's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "moe/int8_path-inl.h"

namespace cpumoe {

template <class Isa, class FloatCodec>
class PlanesPath {
  using Codec = ByteCodec<Isa, FloatCodec>;
  using Gemm = QuadGemm<Isa, Codec>;
  using Stage = QuadStage<Codec>;
  static constexpr int kGroupSize = Codec::Format::kGroupSize;
  static constexpr int kPlanes = Stage::kPlanes;

 public:
  static constexpr int kBlockTokens = Isa::kQuadTokens / kPlanes;
  static constexpr int kFeatureTiles = kGroupSize / kTileRows;
  static constexpr int64_t kPanelBytes = Gemm::kPanelBytes;

  static int TilesAtOnce(const TokenBlocks&) { return Isa::kTiles; }

  static int64_t StagedBytes(StagedForm, int64_t columns) {
    return kPlanes * QuadBlock::BytesPerToken(columns, kGroupSize);
  }

  static void StageRows(StagedForm, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    const Stage stage(block, kPlanes * tokens, columns);
    VisitElements(dtype, x, [&](const auto* elements) {
      for (int t = 0; t < tokens; ++t) {
        stage.RowInPlanes(elements + token[t] * row_stride, kPlanes * t, columns);
      }
    });
  }

  static void StageFeatures(StagedForm, const float* h, int64_t first, int /*count*/, int t,
                            int tokens, int64_t columns, std::byte* block) {
    Stage(block, kPlanes * tokens, columns).GroupInPlanes(h, kPlanes * t, first / kGroupSize);
  }

  // c[pair][tile][token][16]
  static void Multiply(const FloatCodec&, std::span<const TilePair> w, const TokenBlocks& blocks,
                       StagedForm, const std::byte* staged, std::byte* panel, float* c) {
    const int64_t tokens = blocks.tokens();
    const TokenBlocks planes(kPlanes * tokens, Isa::kQuadTokens);
    for (const TilePair& pair : w) {
      alignas(64) float products[TilePair::kCount * Isa::kQuadTokens * kTileRows];
      Gemm::Run(Codec{}, pair, planes, staged, panel, products);
      const float* in = products;
      for (int64_t i = 0; i < TilePair::kCount * tokens; ++i) {
        auto sum = Isa::Load(in + (kPlanes - 1) * kTileRows);
        for (int p = kPlanes - 2; p >= 0; --p) sum = Isa::Add(sum, Isa::Load(in + p * kTileRows));
        Isa::Store(c, sum);
        in += kPlanes * kTileRows;
        c += kTileRows;
      }
    }
  }
};

}  // namespace cpumoe
