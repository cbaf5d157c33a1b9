// The vocabulary of operations that an ISA supplies, and the codec that a weight format supplies.
//
// The algorithms (gemm-inl.h, activation-inl.h, ...) are written once in this vocabulary. An ISA is
// a class of types and static functions in kernels/<isa>/ops-inl.h. It may derive from another ISA
// and replace the operations that it does better.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/float_types.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

// Base class of the ISAs whose multiplicands and activations are fp32. A code times a scale of few
// bits is exact (FoldingCodec). Only an overflow would be wrong, because infinity times an
// activation of zero is NaN.
struct Fp32Multiplicands {
  using Activation = float;
  static constexpr int kPanelStep = 2;
  static constexpr float kFoldUnit = 1.0f;
  static constexpr bool kSplitsPairs = false;
  static Activation ToActivation(float x) { return x; }
  static constexpr bool FoldsExactly(float /*least*/, float greatest) {
    return greatest <= std::numeric_limits<float>::max();
  }
};

// An ISA has two kinds of numbers of tokens. k<Kernel>Tokens is the most that a kernel takes at
// once, its MR. k<Kernel>Limit is the most tokens of an expert for which paths choose the kernel.

// Isa::Vec         one fp32 per row of a tile
// Isa::Activation  element type of the staged activations, which multiplicands are multiplied with
// Isa::Pair        multiplicands: the weights (k, k+1) of every row of a tile
// Isa::Codes       one packed vector of a tile, or its address; must not outlive the tile's bytes
// Isa::Table16     values of the sixteen 4-bit codes, exact in bf16
// Isa::Fold        E8M0 scales of a group, in the form that multiplies a Pair exactly if the Pair
//                  comes from a table with kFoldUnit times the codes' values. Other types of scales
//                  have forms that multiply the codes' values themselves.
template <class Isa>
concept VectorIsa = requires(
    typename Isa::Vec v, typename Isa::Pair pair, typename Isa::Codes codes,
    typename Isa::Table16 table, const std::array<float, 16>& values, const std::byte* bytes,
    const float* in, float* out, const typename Isa::Activation* a, typename Isa::Fold fold,
    typename Isa::Activation* staged, const E8M0* e8m0, const Bf16* bf16, const UE5M3* ue5m3) {
  { Isa::kTiles } -> std::convertible_to<int>;        // NR / 16: tiles that a micro-kernel computes
  { Isa::kFusedTokens } -> std::convertible_to<int>;  // MR of the fused kernel
  // For formats without scales, which are decoded in few registers.
  { Isa::kUnscaledFusedTokens } -> std::convertible_to<int>;
  { Isa::kPanelTokens } -> std::convertible_to<int>;  // MR of the panel kernel, >= kFusedTokens
  { Isa::kPanelPairs } -> std::convertible_to<int>;   // KC / 2: pairs of a panel
  { Isa::kPanelStep } -> std::convertible_to<int>;    // successive k of a token in a panel's A
  // If true, panel kernels load half a Pair at a time.
  { Isa::kSplitsPairs } -> std::convertible_to<bool>;
  // Most tokens for which the fused kernel is faster than the panel kernel.
  { Isa::kFusedLimit } -> std::convertible_to<int>;
  { Isa::Zero() } -> std::same_as<typename Isa::Vec>;
  { Isa::Load(in) } -> std::same_as<typename Isa::Vec>;  // unaligned
  { Isa::Broadcast(1.0f) } -> std::same_as<typename Isa::Vec>;
  { Isa::Add(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Mul(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Div(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Fma(v, v, v) } -> std::same_as<typename Isa::Vec>;  // a * b + c
  { Isa::Min(v, v) } -> std::same_as<typename Isa::Vec>;     // keeps a NaN of the second operand
  { Isa::Max(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Round(v) } -> std::same_as<typename Isa::Vec>;     // to the nearest integer
  { Isa::Ldexp(v, v) } -> std::same_as<typename Isa::Vec>;  // a * 2^n, |n| <= 160, saturating
  Isa::Store(out, v);
  { Isa::LoadCodes(bytes) } -> std::same_as<typename Isa::Codes>;
  { Isa::MakeTable(values) } -> std::same_as<typename Isa::Table16>;
  { Isa::template Lookup<0>(table, codes) } -> std::same_as<typename Isa::Pair>;
  { Isa::FromBf16(codes) } -> std::same_as<typename Isa::Pair>;  // codes of 16 bits, bf16 weights
  // Codes of 8 bits, E4M3 weights that are not NaN; exact, subnormals too.
  { Isa::template FromE4M3<0>(codes) } -> std::same_as<typename Isa::Pair>;
  { Isa::LoadScales(e8m0) } -> std::same_as<typename Isa::Vec>;  // sixteen scales as fp32
  { Isa::LoadScales(bf16) } -> std::same_as<typename Isa::Vec>;
  { Isa::LoadScales(ue5m3) } -> std::same_as<typename Isa::Vec>;
  { Isa::LoadFold(e8m0) } -> std::same_as<typename Isa::Fold>;
  { Isa::Multiply(pair, Isa::LoadFold(ue5m3)) } -> std::same_as<typename Isa::Pair>;
  { Isa::Dot(v, pair, a) } -> std::same_as<typename Isa::Vec>;  // v + pair . (a[0], a[1])
  // The factor of the values in a table for folding (TimesFoldUnit).
  { Isa::kFoldUnit } -> std::convertible_to<float>;
  { Isa::Multiply(pair, fold) } -> std::same_as<typename Isa::Pair>;
  { Isa::FoldsExactly(1.0f, 1.0f) } -> std::same_as<bool>;
  { Isa::ToActivation(1.0f) } -> std::same_as<typename Isa::Activation>;
  // Converts a Vec as ToActivation does, except subnormals where they count as zero.
  Isa::StoreActivations(staged, v);
};

// Whether an ISA's multiplicands hold fp16 weights: codes of 16 bits, finite; exact, subnormals
// too. ISAs that multiply bf16 do not hold them.
template <class Isa>
concept HoldsFp16 = VectorIsa<Isa> && requires(typename Isa::Codes codes) {
  { Isa::FromFp16(codes) } -> std::same_as<typename Isa::Pair>;
};

// What attention needs in addition: sixteen numbers as fp32, unaligned. No number is lost, because
// all of them are exact in fp32.
template <class Isa>
concept NumbersIsa = HoldsFp16<Isa> && requires(const Bf16* bf16, const Fp16* fp16) {
  { Isa::Load(bf16) } -> std::same_as<typename Isa::Vec>;
  { Isa::Load(fp16) } -> std::same_as<typename Isa::Vec>;
};

// What writing experts to memory needs in addition.
template <class Isa>
concept StreamIsa = requires(std::byte* to, const std::byte* from) {
  { Isa::kRegisterBytes } -> std::convertible_to<int>;  // of a vector: 16, 32 or 64
  // Copies kVectorBytes bytes past the caches, where the ISA can. `to` is a multiple of as many.
  Isa::Stream(to, from);
  // Afterwards other threads and devices see what this thread has streamed.
  Isa::FinishStreams();
};

// Whether the floating point kernels of an ISA round activations to less than fp32.
template <class Isa>
concept RoundsActivations = !std::same_as<typename Isa::Activation, float>;

// An ISA that rounds activations names the nearest one that does not, Isa::Wide.
struct NoWideIsa {};
template <class Isa>
struct WideIsaTraits {
  using Type = NoWideIsa;
};
template <RoundsActivations Isa>
struct WideIsaTraits<Isa> {
  using Type = typename Isa::Wide;
};
template <class Isa>
using WideIsaOf = typename WideIsaTraits<Isa>::Type;

// An ISA has a panel unit if something multiplies panels better than vector instructions do. A unit
// is an object that lives as long as a task multiplies panels. It keeps the sums C [n][tokens][16]
// of a block, for n = kTiles tiles and up to kWideTokens tokens, or for n = 1 tile and up to
// kPanelTokens tokens. A unit may read packed weights in place (PairedCodec).
//
//   unit.Begin<n>(tokens)    C = 0
//   unit.Step<n>(panel, distance, a)
//                            C += a[tokens][kPanelStep] * panel[n][kPanelStep / 2], where the pairs
//                            of tiles are `distance` apart
//   unit.End<n>(c)           c = C
//
// On an ISA with a panel unit, the int8 path multiplies bytes for at most Isa::kQuadLimit
// tokens of an expert.
template <class Isa>
concept HasPanelUnit = requires { typename Isa::PanelUnit; };

struct NoPanelUnit {};
template <class Isa>
struct PanelUnitTraits {
  using Type = NoPanelUnit;
};
template <HasPanelUnit Isa>
struct PanelUnitTraits<Isa> {
  using Type = typename Isa::PanelUnit;
};
template <class Isa>
using PanelUnitOf = typename PanelUnitTraits<Isa>::Type;

// What the byte paths need in addition: products of unsigned weight bytes with signed activation
// bytes.
//
// Isa::ByteTable   bytes of the sixteen 4-bit codes
// Isa::Quad        four weights of every row of a tile, in the order kQuadOrder
// Isa::QuadSum     sums of products of quads, modulo 2^16 or 2^32; exact if the final sum is within
//                  kQuadSumLimit. With 16 bits there are two sums, one per half of the quads.
//
// StartSum takes the bits that the sums of a row start with. Where sums are narrow
// (kHasNarrowQuadSums), the sums of digits start with zero, and FinishDigits adds the start.
// Elsewhere FinishDigits ignores the start.
template <class Isa>
concept ByteIsa =
    VectorIsa<Isa> &&
    requires(typename Isa::Quad quad, typename Isa::Codes codes, typename Isa::ByteTable table,
             typename Isa::QuadSum sum, const std::array<uint8_t, 16>& bytes, const int8_t* a) {
      { Isa::kQuadTokens } -> std::convertible_to<int>;  // MR
      { Isa::kQuadSumLimit } -> std::convertible_to<int32_t>;
      { Isa::kQuadDotIsOneInstruction } -> std::convertible_to<bool>;
      { Isa::MakeByteTable(bytes) } -> std::same_as<typename Isa::ByteTable>;
      { Isa::template LookupQuad<0>(table, codes) } -> std::same_as<typename Isa::Quad>;
      { Isa::StartSum(int32_t{}) } -> std::same_as<typename Isa::QuadSum>;
      {
        Isa::DotQuad(sum, quad, a)
      } -> std::same_as<typename Isa::QuadSum>;  // sum + quad . a[0..3]
      { Isa::FinishSum(sum) } -> std::same_as<typename Isa::Vec>;
      // Most tokens of an expert for which digits are fastest. kPreciseDigitLimit is for calls
      // whose groups all have three digits.
      { Isa::kDigitLimit } -> std::convertible_to<int>;
      { Isa::kPreciseDigitLimit } -> std::convertible_to<int>;
    };

// What the digit kernel needs in addition.
template <class Isa>
concept DigitIsa =
    ByteIsa<Isa> && (Isa::kDigitLimit > 0) &&
    requires(const typename Isa::QuadSum (&two)[2], const typename Isa::QuadSum (&three)[3]) {
      { Isa::template FinishDigits<7>(two, int32_t{}) } -> std::same_as<typename Isa::Vec>;
      {
        Isa::template FinishDigits<7>(three, int32_t{})
      } -> std::same_as<typename Isa::Vec>;  // (three[0] * 2^7 + three[1]) * 2^7 + ...
    };

// Whether sums of quads have 16 bits.
template <class Isa>
inline constexpr bool kHasNarrowQuadSums =
    Isa::kQuadSumLimit <= std::numeric_limits<int16_t>::max();

// A codec says how a format's packed tile becomes multiplicands on an ISA. Where the format has
// scales, GroupScales loads those of a group, of a part of a group, or of several groups
// (kPackedDepthOf).
//
// A codec whose group scales multiply the multiplicands exactly also has FoldScales and
// DecodeFolded. If these are missing, or if a matrix has a scale that leaves the multiplicand's
// range (Isa::FoldsExactly), scales are applied to the fp32 sums.
template <class C, class Isa>
concept ScalingCodec = requires(const C codec, const PackedScaleOf<typename C::Format>* scales) {
  { codec.GroupScales(scales) } -> std::same_as<typename Isa::Vec>;
};

template <class C, class Isa>
concept TileCodec = VectorIsa<Isa> && (!HasScales<typename C::Format> || ScalingCodec<C, Isa>) &&
                    requires(const C codec, typename Isa::Codes codes) {
                      { codec.template Decode<0>(codes) } -> std::same_as<typename Isa::Pair>;
                    };

template <class C, class Isa>
concept FoldingCodec =
    TileCodec<C, Isa> && requires(const C codec, typename Isa::Codes codes,
                                  const PackedScaleOf<typename C::Format>* scales) {
      {
        codec.template DecodeFolded<0>(codes, codec.FoldScales(scales))
      } -> std::same_as<typename Isa::Pair>;
    };

// A codec whose packed vectors are the ISA's pairs says so by a function that returns them.
template <class C, class Isa>
concept PairedCodec = TileCodec<C, Isa> && requires(const std::byte* packed) {
  { C::Pairs(packed) } -> std::same_as<const typename Isa::Pair*>;
};

// Whether scales fold exactly in every matrix of a format.
template <class C, class Isa>
inline constexpr bool kAlwaysFolds = false;
template <class C, class Isa>
  requires FoldingCodec<C, Isa> && requires { C::Format::kLeastScale; }
inline constexpr bool kAlwaysFolds<C, Isa> =
    Isa::FoldsExactly(C::Format::kLeastScale * C::Format::kMinMagnitude,
                      C::Format::kGreatestScale* C::Format::kMaxMagnitude);

// Multiplies the values of a table for folding by `unit`. No value of the result is minus zero.
constexpr std::array<float, 16> TimesFoldUnit(std::array<float, 16> values, float unit) {
  for (float& value : values) value = value * unit + 0.0f;
  return values;
}

}  // namespace cpumoe
