// What a compute path is: how the forward pass multiplies with one kind of activation.
//
// A path stages the tokens of an expert, and later their intermediate features, in blocks of up to
// kBlockTokens in the form that its kernels read, and multiplies staged blocks with pairs of tiles.
// What lies between the two products, and the weighted sum, are the forward pass's.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

// What both halves of a mixed path (mixed_path-inl.h) supply; P::kPanelBytes is the scratch memory
// that Multiply wants, P::kFeatureTiles how many tiles of features are staged at once.
template <class P, class Codec>
concept MultiplierFor =
    requires(StagedForm form, DType dtype, const TokenBlocks& blocks, const Codec& codec,
             std::span<const TilePair> w, const void* x, const int32_t* token, const float* h,
             int64_t n, int i, std::byte* block, const std::byte* staged, float* c) {
      { P::kFeatureTiles } -> std::convertible_to<int>;
      { P::kPanelBytes } -> std::convertible_to<int64_t>;
      // Tiles of a pair that are read side by side.
      { P::TilesAtOnce(form, blocks) } -> std::same_as<int>;
      // Bytes of a staged token of n columns.
      { P::StagedBytes(form, n) } -> std::same_as<int64_t>;
      // block = rows token[0..i) of x [*, n columns], whose rows are n elements apart.
      P::StageRows(form, dtype, x, /*row_stride=*/n, token, i, /*columns=*/n, block);
      // block = features [first, first + count) of its token t, from h.
      P::StageFeatures(form, dtype, h, /*first=*/n, /*count=*/i, /*t=*/i, /*tokens=*/i,
                       /*columns=*/n, block);
      // c [pair][block][tile][token][16] = staged blocks * tiles^T.
      P::Multiply(codec, w, blocks, form, staged, /*panel=*/block, c);
    };

template <class P, class Codec>
concept PathFor =
    MultiplierFor<P, Codec> && requires(DType dtype, const TokenBlocks& blocks, int i) {
      { P::kCrossover } -> std::convertible_to<int>;    // most tokens for the few-token kernels
      { P::kBlockTokens } -> std::convertible_to<int>;  // MR
      { P::FormFor(dtype, blocks, /*few_token_limit=*/i) } -> std::same_as<StagedForm>;
    };

}  // namespace cpumoe
