// The default compute path of few tokens, where bytes are multiplied faster than floating point
// numbers: exact integer weights times activations of 21 bits (kernels/plane_gemm-inl.h). See
// float_path-inl.h for what a path is.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/float_types.h"
#include "kernels/plane_gemm-inl.h"
#include "kernels/token_blocks.h"
#include "moe/byte_codec-inl.h"
#include "packing/planes-inl.h"

namespace cpumoe {

// For up to kMostTokens of an expert.
template <class Isa, class FloatCodec, int kMostTokens>
class PlanesPath {
  using Codec = ByteCodec<Isa, FloatCodec>;
  using Gemm = PlaneGemm<Isa, Codec>;
  using Stage = PlaneStage<Codec>;
  using Group = typename Stage::Group;
  static constexpr int kGroupSize = Codec::Format::kGroupSize;

 public:
  static constexpr int kFeatureTiles = kGroupSize / kTileRows;  // whole groups are rounded at once
  static_assert(kGroupSize % kTileRows == 0);
  static constexpr int64_t kPanelBytes = 0;

  static int TilesAtOnce(StagedForm, const TokenBlocks&) { return TilePair::kCount; }

  static int64_t StagedBytes(StagedForm, int64_t columns) {
    return columns / kGroupSize * static_cast<int64_t>(sizeof(Group));
  }

  static void StageRows(StagedForm, DType dtype, const void* x, int64_t row_stride,
                        const int32_t* token, int tokens, int64_t columns, std::byte* block) {
    VisitElements(dtype, x, [&](const auto* elements) {
      for (int t = 0; t < tokens; ++t) {
        Stage::Row(elements + token[t] * row_stride, columns, GroupsOf(t, columns, block));
      }
    });
  }

  // Features [first, first + count), a group, of token t of a block.
  static void StageFeatures(StagedForm, const float* h, int64_t first, int /*count*/, int t,
                            int /*tokens*/, int64_t columns, std::byte* block) {
    Stage::Write(h, GroupsOf(t, columns, block)[first / kGroupSize]);
  }

  // c[pair][block][tile][token][16]
  static void Multiply(const FloatCodec&, std::span<const TilePair> w, const TokenBlocks& blocks,
                       StagedForm, const std::byte* staged, std::byte* /*panel*/, float* c) {
    std::array<typename Gemm::Token, kMostTokens> tokens;
    const int64_t columns = w[0].groups * kGroupSize;
    for (const TilePair& pair : w) {
      int64_t count = 0;
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int size = blocks.Size(b);
        for (int t = 0; t < size; ++t, ++count, c += kTileRows) {
          tokens[count] = {GroupsOf(count, columns, staged), {c, c + size * kTileRows}};
        }
        c += size * kTileRows;
      }
      Gemm::Run(Codec{}, pair, std::span(tokens.data(), count));
    }
  }

 private:
  template <class Byte>
  static auto GroupsOf(int64_t token, int64_t columns, Byte* staged) {
    using Groups = std::conditional_t<std::is_const_v<Byte>, const Group, Group>;
    return reinterpret_cast<Groups*>(staged) + token * (columns / kGroupSize);
  }
};

}  // namespace cpumoe
