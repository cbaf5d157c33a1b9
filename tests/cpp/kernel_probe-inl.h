// Implements kernel_probe.h for one ISA and format.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/check.h"
#include "cpp/kernel_probe.h"
#include "formats/weight_format.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"
#include "moe/activation-inl.h"
#include "paths/compute_paths-inl.h"

namespace cpumoe::kernel_probe {

template <class Isa, class Codec>
struct Probe {
  using Format = typename Codec::Format;
  using FloatIsa = FloatIsaOf<Isa, Codec>;
  using FloatCodec = FloatCodecOf<Isa, Codec>;
  using Kernels = Gemm<FloatIsa, FloatCodec>;
  // With several blocks, if the fused kernel takes them.
  static constexpr int kFusedTokens =
      std::min(TileGemm<FloatIsa, FloatCodec>::kMostFewTokens, 2 * FloatIsa::kPanelTokens + 1);

  static bool FoldsExactly(float least_scale, float greatest_scale) {
    if constexpr (HasScales<Format>) {
      return Kernels::kFolding && FloatIsa::FoldsExactly(least_scale * Format::kMinMagnitude,
                                                         greatest_scale * Format::kMaxMagnitude);
    } else {
      return true;
    }
  }

  static void Multiply(Path path, const TileView* tiles, int count, int64_t groups, const float* a,
                       int64_t tokens, float* c) {
    Require(path != Path::kFused || tokens <= kFusedTokens, "too many tokens: ", tokens);
    Require(path != Path::kFoldedPanel || Kernels::kFolding, "scales do not fold");
    Require(path != Path::kScaledPanel || !kAlwaysFolds<FloatCodec, FloatIsa>,
            "scales always fold");
    const TilePair w = {.tiles = {tiles[0], tiles[count - 1]},
                        .groups = groups,
                        .fold = path == Path::kFoldedPanel};
    if (path == Path::kInt8) {
      if constexpr (HasInt8Path<Isa, Codec>) {
        Multiply<Int8Path<Isa, Codec>>(w, count, StagedForm::kPanel, a, tokens, c);
      } else {
        throw std::invalid_argument("there is no int8 path");
      }
    } else if (path == Path::kDigits || path == Path::kDigitsOfBf16) {
      MultiplyDigits(path, w, count, a, tokens, c);
    } else {
      const auto form = path == Path::kFused ? StagedForm::kFused : StagedForm::kPanel;
      Multiply<FloatPath<FloatIsa, FloatCodec>, float, FloatCodec>(w, count, form, a, tokens, c);
    }
  }

  static void MultiplyDigits(Path path, const TilePair& w, int count, const float* a,
                             int64_t tokens, float* c) {
    // The probe instantiates only kernels that variants have, because compiling kernels takes long.
    if constexpr (!HasDigitPath<Isa, Codec>) {
      throw std::invalid_argument("there is no digit path");
    } else {
      using Digits = DigitPath<Isa, Codec>;
      if (path == Path::kDigits) {
        Multiply<Digits>(w, count, StagedForm::kBytes, a, tokens, c);
        return;
      }
      std::vector<Bf16> x;
      for (int64_t i = 0; i < tokens * w.groups * kGroupSize; ++i) {
        x.push_back(Bf16::FromFloat(a[i]));
      }
      Multiply<Digits>(w, count, StagedForm::kBytes, x.data(), tokens, c);
    }
  }

  template <class Compute, class Element, class PathCodec = Codec>
  static void Multiply(const TilePair& w, int count, StagedForm form, const Element* a,
                       int64_t tokens, float* c) {
    constexpr DType kDType = std::is_same_v<Element, Bf16> ? DType::kBf16 : DType::kFp32;
    const int64_t columns = w.groups * kGroupSize;
    const int64_t bytes = Compute::StagedBytes(form, columns);
    const TokenBlocks blocks(tokens, Compute::kBlockTokens);
    // The buffer is exactly as long as needed, so that a sanitizer notices reads beyond it.
    std::vector<std::byte> staged(tokens * bytes);
    std::vector<int32_t> ids(tokens);
    for (int64_t t = 0; t < tokens; ++t) ids[t] = static_cast<int32_t>(t);
    for (int64_t b = 0; b < blocks.count(); ++b) {
      Compute::StageRows(form, kDType, a, columns, &ids[blocks.Begin(b)], blocks.Size(b), columns,
                         staged.data() + blocks.Begin(b) * bytes);
    }
    const AlignedBuffer panel(Compute::kPanelBytes);
    std::vector<float> sums(Product::Size(1, tokens));
    const Product product(sums.data(), blocks);
    Compute::Multiply(PathCodec{}, std::span(&w, 1), form, staged.data(), panel.data(), product);
    for (int64_t b = 0; b < blocks.count(); ++b) {
      for (int t = 0; t < blocks.Size(b); ++t) {
        for (int tile = 0; tile < count; ++tile) {
          c = std::copy_n(product.At(0, b, tile, t), kTileRows, c);
        }
      }
    }
  }

  static FormatEntry Entry(const char* row) {
    return {.format = row,
            .folds = Kernels::kFolding,
            .scales_sums = !kAlwaysFolds<FloatCodec, FloatIsa>,
            .digits = HasDigitPath<Isa, Codec>,
            .int8 = HasInt8Path<Isa, Codec>,
            .fused_tokens = kFusedTokens,
            .panel_tokens = FloatIsa::kPanelTokens,
            .panel_groups = Kernels::kPanelGroups,
            .panel_unit = HasPanelUnit<FloatIsa>,
            .wide = !std::is_same_v<FloatIsa, Isa>,
            .activation_bits = RoundsActivations<FloatIsa> ? 8 : std::numeric_limits<float>::digits,
            .int8_tokens = Isa::kQuadTokens,
            .folds_exactly = &Probe::FoldsExactly,
            .multiply = &Probe::Multiply};
  }
};

template <class Isa>
struct IsaProbe {
  using Vec = typename Isa::Vec;

  static void ExpOf(const float* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      Isa::Store(out + i, Exp<Isa>(Isa::Load(in + i)));
    }
  }
  static void ActivationOf(const Glu& glu, const float* gate, const float* up, float* out,
                           int64_t count) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      VisitGluFunction(glu.function, [&](auto function) {
        Isa::Store(out + i, Activate<Isa, function()>(glu, Isa::Load(gate + i), Isa::Load(up + i)));
      });
    }
  }
};

}  // namespace cpumoe::kernel_probe
