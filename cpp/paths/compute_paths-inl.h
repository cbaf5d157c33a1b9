// The compute paths that an ISA takes for a format (path.h says what a path is).
#pragma once

#include "formats/integer_codes.h"
#include "kernels/isa.h"
#include "paths/digit_path-inl.h"
#include "paths/float_path-inl.h"
#include "paths/int8_path-inl.h"
#include "paths/mixed_path-inl.h"

namespace cpumoe {

// Whether a format has the groups that the byte paths need: its codes are integers, and a group is
// a whole number of tiles of intermediate features. The ISA's sums must also hold a group's
// products, which HasDigitPath and HasInt8Path check.
template <class Codec>
concept HasByteGroups =
    HasIntegerCodes<typename Codec::Format> && Codec::Format::kGroupSize % kTileRows == 0;
template <class Isa, class Codec>
concept HasDigitPath =
    HasByteGroups<Codec> && (Isa::kDigitLimit > 0) && DigitsFit<ByteCodec<Isa, Codec>>();
template <class Isa, class Codec>
concept HasInt8Path =
    HasByteGroups<Codec> && QuadSumsFit<Isa, ByteCodec<Isa, Codec>>(kMaxQuadValue);

template <class Isa, class Codec>
struct DefaultPathTraits {
  using Type = FloatPath<Isa, Codec>;
};
template <class Isa, class Codec>
  requires HasDigitPath<Isa, Codec>
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
  static_assert(HasDigitPath<Isa, Codec>,
                "on an ISA that rounds activations to bf16, fp32 calls are multiplied as digits of "
                "bytes: give the format kUnit and groups for them (formats/integer_codes.h), the "
                "ISA kDigitLimit > 0, or this pair a path that keeps fp32");
  using Type = DigitPath<Isa, Codec>;
};

// The path of Precision::kBf16 for calls whose activations must not be rounded to bf16.
template <class Isa, class Codec>
using PrecisePathOf = typename PrecisePathTraits<Isa, Codec>::Type;

template <class Isa, class Codec>
struct Int8PathTraits {
  using Type = Int8Path<Isa, Codec>;
};
template <HasPanelUnit Isa, class Codec>
struct Int8PathTraits<Isa, Codec> {
  static_assert(Isa::kQuadLimit <= Isa::kQuadTokens, "up to there an expert is one block");
  using Type = MixedPath<Codec, Int8Path<Isa, Codec>, FloatPath<Isa, Codec>, Isa::kQuadLimit>;
};

// The path of Precision::kInt8.
template <class Isa, class Codec>
using Int8PathOf = typename Int8PathTraits<Isa, Codec>::Type;

}  // namespace cpumoe
