// A compute path of two: one that multiplies bytes for few tokens of an expert (or for any number),
// and one that multiplies floating point numbers for many.
//
// On most ISAs the default path is of this kind, because codes become bytes with less work than
// they become floating point numbers (digit_path-inl.h), and so is the int8 path where an ISA
// multiplies floating point panels in a unit of its own (AMX's tiles). With many tokens the unit
// multiplies bf16, faster than bytes could be multiplied: sums of bytes need scaling per group, so
// that products would have to leave the tiles after every 32 columns (docs/performance.md). So
// nothing is gained by rounding, and nothing is rounded.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/isa.h"
#include "kernels/token_blocks.h"
#include "moe/path.h"

namespace cpumoe {

// Few for up to kFewTokens tokens, in calls of elements more precise than bf16 kPreciseTokens.
template <class Codec, MultiplierFor<Codec> Few, PathFor<Codec> Many, int kFewTokens,
          int kPreciseTokens = kFewTokens>
class MixedPath {
 public:
  static constexpr int kCrossover = std::max(kFewTokens, Many::kCrossover);
  static constexpr int kBlockTokens = Many::kBlockTokens;
  static constexpr int kFeatureTiles = Few::kFeatureTiles;
  static_assert(kFeatureTiles % Many::kFeatureTiles == 0);
  static constexpr int64_t kPanelBytes = std::max(Few::kPanelBytes, Many::kPanelBytes);

  static int TilesAtOnce(StagedForm form, const TokenBlocks& blocks) {
    return form == StagedForm::kBytes ? Few::TilesAtOnce(form, blocks)
                                      : Many::TilesAtOnce(form, blocks);
  }

  static int64_t StagedBytes(StagedForm form, int64_t columns) {
    return form == StagedForm::kBytes ? Few::StagedBytes(form, columns)
                                      : Many::StagedBytes(form, columns);
  }

  static StagedForm FormFor(DType dtype, const TokenBlocks& blocks, int few_token_limit) {
    const int few = dtype == DType::kBf16 ? kFewTokens : kPreciseTokens;
    return blocks.tokens() <= std::min(few_token_limit, few)
               ? StagedForm::kBytes
               : Many::FormFor(dtype, blocks, few_token_limit);
  }

  static void StageRows(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    Visit(form, [&](auto path) {
      decltype(path)::StageRows(form, dtype, x, row_stride, token, tokens, columns, block);
    });
  }

  static void StageFeatures(StagedForm form, DType dtype, const float* h, int64_t first, int count,
                            int t, int tokens, int64_t columns, std::byte* block) {
    Visit(form, [&](auto path) {
      using Path = decltype(path);
      constexpr int kRows = Path::kFeatureTiles * kTileRows;
      for (int i = 0; i < count; i += kRows) {
        Path::StageFeatures(form, dtype, h + i, first + i, std::min(kRows, count - i), t, tokens,
                            columns, block);
      }
    });
  }

  static void Multiply(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                       StagedForm form, const std::byte* staged, std::byte* panel, float* c) {
    Visit(form,
          [&](auto path) { decltype(path)::Multiply(codec, w, blocks, form, staged, panel, c); });
  }

 private:
  template <class Body>
  static void Visit(StagedForm form, Body&& body) {
    if (form == StagedForm::kBytes) {
      body(Few{});
    } else {
      body(Many{});
    }
  }
};

}  // namespace cpumoe
