// The compute paths that an ISA takes for a format (path.h says what a path is).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "formats/integer_codes.h"
#include "kernels/isa.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "packing/scale_range.h"
#include "paths/compute_path.h"
#include "paths/digit_path-inl.h"
#include "paths/float_path-inl.h"
#include "paths/int8_path-inl.h"
#include "paths/kernel_options.h"
#include "paths/mixed_path-inl.h"
#include "paths/path.h"
#include "paths/wide_path-inl.h"

namespace cpumoe {

// Whether the byte paths can compute a format: its codes are integers, and the ISA's sums hold a
// group's products.
template <class Isa, class Codec>
concept HasDigitPath = HasIntegerCodes<typename Codec::Format> && (Isa::kDigitLimit > 0) &&
                       DigitsFit<ByteCodec<Isa, Codec>>();
template <class Isa, class Codec>
concept HasInt8Path = HasIntegerCodes<typename Codec::Format> &&
                      QuadSumsFit<Isa, ByteCodec<Isa, Codec>>(kMaxQuadValue);

// The ISA whose floating point kernels compute a format: Isa, or Isa::Wide if the multiplicands of
// Isa do not hold the format's weights.
template <class Isa, class Codec>
struct FloatIsaTraits {
  using Type = WideIsaOf<Isa>;
};
template <class Isa, class Codec>
  requires TileCodec<Codec, Isa>
struct FloatIsaTraits<Isa, Codec> {
  using Type = Isa;
};
template <class Isa, class Codec>
using FloatIsaOf = typename FloatIsaTraits<Isa, Codec>::Type;
template <class Isa, class Codec>
using FloatCodecOf = typename CodecOn<Codec, FloatIsaOf<Isa, Codec>>::Type;

template <class Isa, class Codec>
struct DefaultPathTraits {
  using Type = WidePath<Isa, Codec>;
};
template <class Isa, class Codec>
  requires TileCodec<Codec, Isa>
struct DefaultPathTraits<Isa, Codec> {
  using Type = FloatPath<Isa, Codec>;
};
template <class Isa, class Codec>
  requires TileCodec<Codec, Isa> && HasDigitPath<Isa, Codec>
struct DefaultPathTraits<Isa, Codec> {
  using Type = MixedPath<Codec, DigitPath<Isa, Codec>, FloatPath<Isa, Codec>, Isa::kDigitLimit,
                         Isa::kPreciseDigitLimit>;
};

// The path of Precision::kBf16. If codes are integers, it takes digits for as many tokens as digits
// are faster for on this ISA.
template <class Isa, class Codec>
using DefaultPathOf = typename DefaultPathTraits<Isa, Codec>::Type;

template <class Isa, class Codec>
struct PrecisePathTraits {
  using Type = DefaultPathOf<Isa, Codec>;
};
template <RoundsActivations Isa, class Codec>
struct PrecisePathTraits<Isa, Codec> {
  using Type = WidePath<Isa, Codec>;
};
template <RoundsActivations Isa, class Codec>
  requires HasDigitPath<Isa, Codec>
struct PrecisePathTraits<Isa, Codec> {
  using Type = DigitPath<Isa, Codec>;
};

// The path of Precision::kBf16 for calls whose activations must not be rounded to bf16: digits of
// bytes where codes are integers, and the wider ISA's floating point elsewhere.
template <class Isa, class Codec>
using PrecisePathOf = typename PrecisePathTraits<Isa, Codec>::Type;

template <class Isa, class Codec>
struct Int8PathTraits {
  using Type = DefaultPathOf<Isa, Codec>;
};
template <class Isa, class Codec>
  requires HasInt8Path<Isa, Codec>
struct Int8PathTraits<Isa, Codec> {
  using Type = Int8Path<Isa, Codec>;
};
template <HasPanelUnit Isa, class Codec>
  requires HasInt8Path<Isa, Codec>
struct Int8PathTraits<Isa, Codec> {
  static_assert(Isa::kQuadLimit <= Isa::kQuadTokens, "up to there an expert is one block");
  using Type = MixedPath<Codec, Int8Path<Isa, Codec>, FloatPath<Isa, Codec>, Isa::kQuadLimit>;
};

// The path of Precision::kInt8: the default path where there is no int8 path.
template <class Isa, class Codec>
using Int8PathOf = typename Int8PathTraits<Isa, Codec>::Type;

// Whether every product of a code and one of these scales is exact in the ISA's multiplicand type.
template <class Isa, class Codec>
bool FoldsExactly([[maybe_unused]] const ScaleRange& scales) {
  using Format = typename Codec::Format;
  if constexpr (HasScales<Format> && !kAlwaysFolds<Codec, Isa>) {
    return Isa::FoldsExactly(scales.least * Format::kMinMagnitude,
                             scales.greatest * Format::kMaxMagnitude);
  } else {
    return true;
  }
}

template <class Isa, class Codec, PathFor<Codec> Path>
  requires(Path::kBlockTokens <= kMostBlockTokens)
inline constexpr ComputePath kComputePath = {
    .few_token_limit = Path::kFewTokenLimit,
    .block_tokens = Path::kBlockTokens,
    .feature_tiles = Path::kFeatureTiles,
    .panel_bytes = Path::kPanelBytes,
    .tiles_at_once = &Path::TilesAtOnce,
    .staged_bytes = &Path::StagedBytes,
    .form_for = &Path::FormFor,
    .stage_rows = &Path::StageRows,
    .stage_features = &Path::StageFeatures,
    .multiply = [](std::span<const TilePair> w, StagedForm form, const std::byte* staged,
                   std::byte* panel,
                   const Product& c) { Path::Multiply(Codec{}, w, form, staged, panel, c); },
    .folds_exactly = &FoldsExactly<Isa, Codec>};

// The compute path of a call with these ForwardArgs or LinearArgs.
template <class Isa, class Codec, class Args>
const ComputePath& ComputePathOf(Precision precision, [[maybe_unused]] const Args& args) {
  if constexpr (HasInt8Path<Isa, Codec>) {
    if (precision == Precision::kInt8) return kComputePath<Isa, Codec, Int8PathOf<Isa, Codec>>;
  }
  if constexpr (RoundsActivations<Isa>) {
    const bool exact = args.input_dtype == DType::kFp32 && !args.fp32_as_bf16;
    if (exact) return kComputePath<Isa, Codec, PrecisePathOf<Isa, Codec>>;
  }
  return kComputePath<Isa, Codec, DefaultPathOf<Isa, Codec>>;
}

}  // namespace cpumoe
