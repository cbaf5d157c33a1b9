// A compute path as the passes of experts and of single matrices see it. Passes are compiled once
// per ISA, and a path's functions once per format (path.h says what a path is).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"
#include "packing/scale_range.h"
#include "paths/kernel_options.h"

namespace cpumoe {

// Most tokens of a staged block of any path.
inline constexpr int kMostBlockTokens = 64;

// Most fields are what the concepts MultiplierFor and PathFor describe.
struct ComputePath {
  int few_token_limit;
  int block_tokens;
  int feature_tiles;
  int64_t panel_bytes;
  int (*tiles_at_once)(StagedForm form, const TokenBlocks& blocks);
  int64_t (*staged_bytes)(StagedForm form, int64_t columns);
  StagedForm (*form_for)(DType dtype, int64_t tokens, int few_token_limit);
  void (*stage_rows)(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                     const int32_t* token, int tokens, int64_t columns, std::byte* block);
  void (*stage_features)(StagedForm form, DType dtype, const float* h, int64_t first, int t,
                         int tokens, int64_t columns, std::byte* block);
  void (*multiply)(std::span<const TilePair> w, StagedForm form, const std::byte* staged,
                   std::byte* panel, const Product& c);
  // Whether every product of a code and one of these scales is exact in the multiplicand type of
  // the ISA's floating point kernels.
  bool (*folds_exactly)(const ScaleRange& scales);

  // Most tokens that the few-token kernels take in a call with these options.
  int FewTokenLimit(const KernelOptions& options) const {
    // Batch invariance needs kernels that take any number of tokens.
    if (options.batch_invariant) return few_token_limit == kAnyTokens ? kAnyTokens : 0;
    return options.few_token_limit < 0 ? few_token_limit : options.few_token_limit;
  }
  // With at most so many tokens of a matrix, a call streams its weights.
  int StreamedTokens() const {
    return std::max(block_tokens, std::min(few_token_limit, kStreamedTokens));
  }
};

}  // namespace cpumoe
