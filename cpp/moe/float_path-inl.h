// The default compute path: exact weights times activations of the ISA's floating point type.
//
// A path is what the forward pass needs to multiply with one kind of activation: how tokens and
// intermediate features are staged, and the product of staged blocks with two tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/float_types.h"
#include "kernels/tile_gemm-inl.h"
#include "kernels/token_blocks.h"
#include "packing/stage-inl.h"

namespace cpumoe {

template <class Isa, class Codec>
class FloatPath {
  using Activation = typename Isa::Activation;
  using Gemm = TileGemm<Isa, Codec>;

 public:
  static constexpr int kBlockTokens = Isa::kPanelTokens;
  static constexpr int kFeatureTiles = 1;  // tiles of intermediate features staged at once
  static constexpr int64_t kPanelBytes = Gemm::kPanelBytes;

  static int64_t StagedBytes(int64_t columns) {
    return columns * static_cast<int64_t>(sizeof(Activation));
  }

  // Gathers rows token[0..tokens) of x [*, columns], row_stride elements apart.
  static void StageRows(DType dtype, const void* x, int64_t row_stride, const int32_t* token,
                        int tokens, int64_t columns, std::byte* block) {
    StageBlock<Isa>(dtype, x, row_stride, token, tokens, columns,
                    reinterpret_cast<Activation*>(block));
  }

  // Features [first, first + count) of token t of a block.
  static void StageFeatures(const float* h, int count, int t, int tokens, int64_t /*columns*/,
                            int64_t first, std::byte* block) {
    StageTile<Isa>(h, t, tokens, count, reinterpret_cast<Activation*>(block) + first * tokens);
  }

  static void Multiply(const Codec& codec, const TilePair& w, const TokenBlocks& blocks,
                       bool invariant, const std::byte* staged, std::byte* panel, float* c) {
    Gemm::Run(codec, w, blocks, invariant, reinterpret_cast<const Activation*>(staged),
              reinterpret_cast<typename Isa::Pair*>(panel), c);
  }
};

}  // namespace cpumoe
