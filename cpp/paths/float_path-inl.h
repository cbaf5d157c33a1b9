// The floating point compute path: exact weights times activations of the ISA's floating point
// type (path.h says what a path is).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "base/float_types.h"
#include "kernels/limits-inl.h"
#include "kernels/product.h"
#include "kernels/tile_gemm-inl.h"
#include "kernels/token_blocks.h"
#include "staging/staging.h"

namespace cpumoe {

template <class Isa, class Codec>
class FloatPath {
  using Activation = typename Isa::Activation;
  using Gemm = TileGemm<Isa, Codec>;
  static_assert(
      kGroupSize % Isa::kPanelStep == 0,
      "a group must be whole steps of the ISA's panels: scales that do not fold are applied "
      "to the sum of each group");

 public:
  static constexpr int kMostFewTokens = Gemm::kMostFewTokens;
  // Most tokens for the fused kernels.
  static constexpr int kFewTokenLimit = std::min(Isa::kFusedLimit, kMostFewTokens);
  static constexpr int kBlockTokens = Isa::kPanelTokens;
  static constexpr int kFeatureTiles = 1;  // tiles of intermediate features that are staged at once
  static constexpr int64_t kPanelBytes = Gemm::kPanelBytes;

  static int64_t Dots(int64_t rounds) { return Limits<Isa>::FloatDots(rounds); }

  static int64_t StagedBytes(StagedForm, int64_t columns) {
    return PaddedColumns(columns) * static_cast<int64_t>(sizeof(Activation));
  }

  static int TilesAtOnce(StagedForm form, const TokenBlocks& blocks) {
    return Gemm::TilesAtOnce(form, blocks);
  }

  static StagedForm FormFor(DType, int64_t tokens, int few_token_limit) {
    return Gemm::FormFor(tokens, few_token_limit);
  }

  static void StageRows(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    FloatStaging<Isa>::Rows(form, dtype, x, row_stride, token, tokens, columns,
                            reinterpret_cast<Activation*>(block));
  }

  static void StageFeatures(StagedForm form, DType, const float* h, int64_t first, int t,
                            int tokens, int64_t /*columns*/, std::byte* block) {
    FloatStaging<Isa>::Features(form, h, first, t, tokens, reinterpret_cast<Activation*>(block));
  }

  static void Multiply(const Codec& codec, std::span<const TilePair> w, StagedForm form,
                       const std::byte* staged, std::byte* panel, const Product& c) {
    Gemm::Run(codec, w, form, reinterpret_cast<const Activation*>(staged),
              reinterpret_cast<typename Isa::Pair*>(panel), c);
  }
};

}  // namespace cpumoe
