// A compute path made of two: `Few` multiplies bytes for few tokens of an expert (or for any
// number), and `Many` multiplies floating point numbers for many tokens.
//
// On most ISAs the default path is of this kind, because decoding codes to bytes takes less work
// than decoding them to floating point numbers (digit_path-inl.h).
//
// The int8 path is of this kind on ISAs whose floating point panels are multiplied in a unit of
// their own (AMX's tiles). With many tokens the unit multiplies bf16, which is faster than
// multiplying bytes there. Sums of bytes need scaling per group, so products would have to leave
// the tiles after every 32 columns (docs/performance.md). Since rounding would gain nothing,
// nothing is rounded.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/isa.h"
#include "kernels/product.h"
#include "kernels/token_blocks.h"
#include "paths/path.h"

namespace cpumoe {

// Takes `Few` for at most kLimit tokens, or at most kPreciseLimit if the elements of the call
// are more precise than bf16.
template <class Codec, MultiplierFor<Codec> Few, PathFor<Codec> Many, int kLimit,
          int kPreciseLimit = kLimit>
class MixedPath {
 public:
  static constexpr int kFewTokenLimit = std::max(kLimit, Many::kFewTokenLimit);
  static constexpr int kMostFewTokens = std::max(kLimit, Many::kMostFewTokens);
  static constexpr int kBlockTokens = Many::kBlockTokens;
  static constexpr int kFeatureTiles = Few::kFeatureTiles;
  static_assert(kFeatureTiles % Many::kFeatureTiles == 0);
  static constexpr int64_t kPanelBytes = std::max(Few::kPanelBytes, Many::kPanelBytes);

  static int64_t Dots(int64_t rounds) {
    return kLimit == kAnyTokens ? Few::Dots(rounds) : Many::Dots(rounds);
  }

  static int TilesAtOnce(StagedForm form, const TokenBlocks& blocks) {
    return form == StagedForm::kBytes ? Few::TilesAtOnce(form, blocks)
                                      : Many::TilesAtOnce(form, blocks);
  }

  static int64_t StagedBytes(StagedForm form, int64_t columns) {
    return form == StagedForm::kBytes ? Few::StagedBytes(form, columns)
                                      : Many::StagedBytes(form, columns);
  }

  static StagedForm FormFor(DType dtype, int64_t tokens, int few_token_limit) {
    const int few = dtype == DType::kBf16 ? kLimit : kPreciseLimit;
    return tokens <= std::min(few_token_limit, few) ? StagedForm::kBytes
                                                    : Many::FormFor(dtype, tokens, few_token_limit);
  }

  static void StageRows(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    Visit(form, [&](auto path) {
      decltype(path)::StageRows(form, dtype, x, row_stride, token, tokens, columns, block);
    });
  }

  static void StageFeatures(StagedForm form, DType dtype, const float* h, int64_t first, int t,
                            int tokens, int64_t columns, std::byte* block) {
    Visit(form, [&](auto path) {
      using Path = decltype(path);
      constexpr int kRows = Path::kFeatureTiles * kTileRows;
      for (int i = 0; i < kFeatureTiles * kTileRows; i += kRows) {
        Path::StageFeatures(form, dtype, h + i, first + i, t, tokens, columns, block);
      }
    });
  }

  static void Multiply(const Codec& codec, std::span<const TilePair> w, StagedForm form,
                       const std::byte* staged, std::byte* panel, const Product& c) {
    Visit(form, [&](auto path) { decltype(path)::Multiply(codec, w, form, staged, panel, c); });
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
