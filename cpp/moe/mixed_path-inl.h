// The int8 compute path where an ISA multiplies floating point panels in a unit of its own: bytes for
// few tokens, the unit for many.
//
// Such a unit (AMX's tiles) multiplies a panel of bf16 faster than bytes could be multiplied whose
// sums need scaling per group: their products would have to leave the tiles after every 32 columns
// (docs/performance.md). So with many tokens nothing is gained by rounding, and nothing is rounded.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "moe/float_path-inl.h"
#include "moe/int8_path-inl.h"

namespace cpumoe {

template <class Isa, class Codec>
class MixedPath {
  using Bytes = Int8Path<Isa, Codec>;
  using Floats = FloatPath<Isa, Codec>;

 public:
  static constexpr int kCrossover = Isa::kQuadCrossover;
  static constexpr int kBlockTokens = Floats::kBlockTokens;
  static_assert(kCrossover <= Bytes::kBlockTokens && kCrossover <= kBlockTokens,
                "few tokens are one block");
  static constexpr int kFeatureTiles = Bytes::kFeatureTiles;
  static_assert(kFeatureTiles % Floats::kFeatureTiles == 0);
  static constexpr int64_t kPanelBytes = std::max(Bytes::kPanelBytes, Floats::kPanelBytes);

  static int64_t StagedBytes(int64_t columns) {
    return std::max(Bytes::StagedBytes(columns), Floats::StagedBytes(columns));
  }

  static StagedForm FormFor(const TokenBlocks& blocks, int fused_tokens) {
    return blocks.tokens() <= std::min(fused_tokens, kCrossover) ? StagedForm::kFused
                                                                 : StagedForm::kPanel;
  }

  static void StageRows(StagedForm form, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    Visit(form, [&](auto path) {
      decltype(path)::StageRows(form, dtype, x, row_stride, token, tokens, columns, block);
    });
  }

  static void StageFeatures(StagedForm form, const float* h, int64_t first, int count, int t,
                            int tokens, int64_t columns, std::byte* block) {
    Visit(form, [&](auto path) {
      using Path = decltype(path);
      constexpr int kRows = Path::kFeatureTiles * kTileRows;
      for (int i = 0; i < count; i += kRows) {
        Path::StageFeatures(form, h + i, first + i, std::min(kRows, count - i), t, tokens, columns,
                            block);
      }
    });
  }

  static void Multiply(const Codec& codec, std::span<const TilePair> w, const TokenBlocks& blocks,
                       StagedForm form, const std::byte* staged, std::byte* panel, float* c) {
    Visit(form, [&](auto path) {
      decltype(path)::Multiply(codec, w, blocks, form, staged, panel, c);
    });
  }

 private:
  template <class Body>
  static void Visit(StagedForm form, Body&& body) {
    if (form == StagedForm::kFused) {
      body(Bytes{});
    } else {
      body(Floats{});
    }
  }
};

}  // namespace cpumoe
