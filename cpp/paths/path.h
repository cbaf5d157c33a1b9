// A compute path: how the forward pass multiplies with one kind of activation.
//
// A path stages the tokens of an expert, and later their intermediate features, in blocks of up to
// kBlockTokens tokens. A staged block has the form that the path's kernels read. The path
// multiplies staged blocks with pairs of tiles. The forward pass itself does the work between the
// two products, and computes the weighted sum.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

// Columns are those of the matrix. Staged rows and tiles have whole groups (PaddedColumns), which
// end with zeros.

// The operations that both halves of a mixed path (mixed_path-inl.h) supply. P::kPanelBytes is the
// scratch memory that Multiply needs. P::kFeatureTiles is the number of tiles of features that are
// staged at once.
template <class P, class Codec>
concept MultiplierFor =
    requires(StagedForm form, DType dtype, const TokenBlocks& blocks, const Codec& codec,
             std::span<const TilePair> w, const void* x, const int32_t* token, const float* h,
             int64_t n, int i, std::byte* block, const std::byte* staged, const Product& c) {
      { P::kFeatureTiles } -> std::convertible_to<int>;
      { P::kPanelBytes } -> std::convertible_to<int64_t>;
      // Does the multiply-adds of the kernels for many tokens and nothing else. Returns how many.
      { P::Dots(/*rounds=*/n) } -> std::same_as<int64_t>;
      // How many tiles of a pair are read side by side.
      { P::TilesAtOnce(form, blocks) } -> std::same_as<int>;
      // The bytes of one staged token of n columns.
      { P::StagedBytes(form, n) } -> std::same_as<int64_t>;
      // block = rows token[0..i) of x [*, n columns], whose rows are n elements apart.
      P::StageRows(form, dtype, x, /*row_stride=*/n, token, i, /*columns=*/n, block);
      // Writes the features of kFeatureTiles tiles, taken from h, to token t of the block, from
      // feature `first` on.
      P::StageFeatures(form, dtype, h, /*first=*/n, /*t=*/i, /*tokens=*/i, /*columns=*/n, block);
      // c = the staged blocks of c.blocks() * tiles^T.
      P::Multiply(codec, w, form, staged, /*panel=*/block, c);
    };

template <class P, class Codec>
concept PathFor = MultiplierFor<P, Codec> && requires(DType dtype, int64_t tokens, int i) {
  // Most tokens of an expert that the path's few-token kernels take.
  { P::kFewTokenLimit } -> std::convertible_to<int>;
  { P::kMostFewTokens } -> std::convertible_to<int>;  // that few-token kernels could take
  { P::kBlockTokens } -> std::convertible_to<int>;    // MR
  // The kernels for so many tokens of an expert.
  { P::FormFor(dtype, tokens, /*few_token_limit=*/i) } -> std::same_as<StagedForm>;
};

}  // namespace cpumoe
