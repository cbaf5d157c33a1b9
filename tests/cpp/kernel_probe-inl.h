// What kernel_probe.h promises, for one ISA and format.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/check.h"
#include "cpp/kernel_probe.h"
#include "formats/weight_format.h"
#include "kernels/tile_gemm-inl.h"
#include "kernels/token_blocks.h"
#include "moe/activation-inl.h"
#include "packing/stage-inl.h"

namespace cpumoe::kernel_probe {

template <class Isa, class Codec>
struct Probe {
  using Format = typename Codec::Format;
  using Tiles = TileGemm<Isa, Codec>;
  using Kernels = Gemm<Isa, Codec>;
  using Activation = typename Isa::Activation;

  static bool FoldsExactly(float least_scale, float greatest_scale) {
    return Kernels::kFolding && Isa::FoldsExactly(least_scale * Format::kMinMagnitude,
                                                  greatest_scale * Format::kMaxMagnitude);
  }

  static void Multiply(Path path, const TileView* tiles, int count, int64_t groups, const float* a,
                       int64_t tokens, float* c) {
    Require(path != Path::kFused || tokens <= Isa::kFusedTokens, "too many tokens: ", tokens);
    Require(path != Path::kFoldedPanel || Kernels::kFolding, "scales do not fold");
    const int64_t columns = groups * Format::kGroupSize;
    const TokenBlocks blocks(tokens, Isa::kPanelTokens);
    // Exactly as long as needed, so that a sanitizer sees what reads beyond.
    std::vector<Activation> staged(tokens * columns);
    std::vector<int32_t> ids(tokens);
    for (int64_t t = 0; t < tokens; ++t) ids[t] = static_cast<int32_t>(t);
    for (int64_t b = 0; b < blocks.count(); ++b) {
      StageBlock<Isa>(a, columns, &ids[blocks.Begin(b)], blocks.Size(b), columns,
                      staged.data() + blocks.Begin(b) * columns);
    }
    typename Tiles::Operands w = {
        .tiles = {}, .count = count, .groups = groups, .fold = path == Path::kFoldedPanel};
    for (int r = 0; r < count; ++r) w.tiles[r] = tiles[r];
    const AlignedBuffer panel(Tiles::kPanelBytes);
    std::vector<float> product(tokens * count * kTileRows);
    Tiles::Run(Codec{}, w, blocks, path != Path::kFused, staged.data(),
               reinterpret_cast<typename Isa::Pair*>(panel.data()), product.data());
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const float* in = product.data() + blocks.Begin(b) * count * kTileRows;
      for (int r = 0; r < count; ++r) {
        for (int64_t t = 0; t < blocks.Size(b); ++t, in += kTileRows) {
          float* out = c + ((blocks.Begin(b) + t) * count + r) * kTileRows;
          for (int i = 0; i < kTileRows; ++i) out[i] = in[i];
        }
      }
    }
  }

  static FormatEntry Entry() {
    return {InfoOf<Format>().name, Kernels::kFolding,    Isa::kFusedTokens, Isa::kPanelTokens,
            Kernels::kPanelGroups, &Probe::FoldsExactly, &Probe::Multiply};
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
  static void ActivationOf(const SwiGlu& swiglu, const float* gate, const float* up, float* out,
                           int64_t count) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      Isa::Store(out + i, Activate<Isa>(swiglu, Isa::Load(gate + i), Isa::Load(up + i)));
    }
  }
  static constexpr int ActivationDigits() {
    return std::is_same_v<typename Isa::Activation, float> ? std::numeric_limits<float>::digits : 8;
  }
};

}  // namespace cpumoe::kernel_probe
