// The vocabulary that an ISA supplies, and the codec that a weight format supplies.
//
// The algorithms (gemm-inl.h, activation) are written once in this vocabulary. An ISA is a class of
// types and static functions in kernels/<isa>/ops-inl.h; it may derive from another and replace
// what it does better.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/float_types.h"
#include "kernels/tile.h"

namespace cpumoe {

// What ISAs have in common whose multiplicands and activations are fp32. A code times a scale of
// any kind has few enough bits to be exact; only an overflow would not be, for infinity times an
// activation of zero is NaN.
struct Fp32Multiplicands {
  using Activation = float;
  static constexpr int kPanelStep = 2;
  static constexpr float kFoldUnit = 1.0f;
  static constexpr bool kSplitsPairs = false;
  static Activation ToActivation(float x) { return x; }
  static bool FoldsExactly(float /*least*/, float greatest) {
    return greatest <= std::numeric_limits<float>::max();
  }
};

// Of an ISA's crossovers: however many tokens an expert has.
inline constexpr int kAnyTokens = std::numeric_limits<int>::max();

// Isa::Vec         one fp32 per row of a tile
// Isa::Activation  element of the staged activations: what a multiplicand is multiplied with
// Isa::Pair        multiplicands: weights (k, k+1) of every row of a tile
// Isa::Codes       one packed vector of a tile, or where it is: not to outlive its bytes
// Isa::Table16     values of the sixteen 4-bit codes, exact in bf16
// Isa::Fold        a group's scales in the form that multiplies a Pair exactly, if it comes from a
//                  table whose values are kFoldUnit times the codes'
template <class Isa>
concept VectorIsa = requires(
    typename Isa::Vec v, typename Isa::Pair pair, typename Isa::Codes codes,
    typename Isa::Table16 table, const std::array<float, 16>& values, const std::byte* bytes,
    const float* in, float* out, const typename Isa::Activation* a, typename Isa::Fold fold,
    typename Isa::Activation* staged, const E8M0* e8m0, const Bf16* bf16) {
  { Isa::kTiles } -> std::convertible_to<int>;        // NR / 16: tiles that a micro-kernel computes
  { Isa::kFusedTokens } -> std::convertible_to<int>;  // MR of the fused kernel
  { Isa::kPanelTokens } -> std::convertible_to<int>;  // MR of the panel kernel, not less
  { Isa::kPanelPairs } -> std::convertible_to<int>;   // KC / 2: pairs of a panel
  { Isa::kPanelStep } -> std::convertible_to<int>;    // successive k of a token in a panel's A
  { Isa::kSplitsPairs } -> std::convertible_to<bool>;  // panel kernels load half a Pair at a time
  { Isa::kCrossover } -> std::convertible_to<int>;     // most tokens that fused is faster for
  { Isa::Zero() } -> std::same_as<typename Isa::Vec>;
  { Isa::Load(in) } -> std::same_as<typename Isa::Vec>;  // unaligned
  { Isa::Broadcast(1.0f) } -> std::same_as<typename Isa::Vec>;
  { Isa::Add(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Mul(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Div(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Fma(v, v, v) } -> std::same_as<typename Isa::Vec>;  // a * b + c
  { Isa::Min(v, v) } -> std::same_as<typename Isa::Vec>;     // NaN in the second operand is kept
  { Isa::Max(v, v) } -> std::same_as<typename Isa::Vec>;
  { Isa::Round(v) } -> std::same_as<typename Isa::Vec>;     // to nearest integer
  { Isa::Ldexp(v, v) } -> std::same_as<typename Isa::Vec>;  // a * 2^n, |n| <= 160, saturating
  Isa::Store(out, v);
  { Isa::LoadCodes(bytes) } -> std::same_as<typename Isa::Codes>;
  { Isa::MakeTable(values) } -> std::same_as<typename Isa::Table16>;
  { Isa::template Lookup<0>(table, codes) } -> std::same_as<typename Isa::Pair>;
  { Isa::LoadScales(e8m0) } -> std::same_as<typename Isa::Vec>;  // sixteen, as fp32
  { Isa::LoadScales(bf16) } -> std::same_as<typename Isa::Vec>;
  { Isa::LoadFold(e8m0) } -> std::same_as<typename Isa::Fold>;
  { Isa::Dot(v, pair, a) } -> std::same_as<typename Isa::Vec>;  // v + pair . (a[0], a[1])
  { Isa::kFoldUnit } -> std::convertible_to<float>;  // of values whose table is to be folded
  { Isa::Multiply(pair, fold) } -> std::same_as<typename Isa::Pair>;
  { Isa::FoldsExactly(1.0f, 1.0f) } -> std::same_as<bool>;
  { Isa::ToActivation(1.0f) } -> std::same_as<typename Isa::Activation>;
  Isa::StoreActivations(staged, v);  // the same of a Vec, but subnormals that count as zero
};

// Whether floating point kernels round activations to less than fp32 has.
template <class Isa>
concept RoundsActivations = !std::same_as<typename Isa::Activation, float>;

// Where an ISA has something better for panels than vector instructions: an object of it lives as
// long as a task multiplies panels, and keeps a block's sums C [n][tokens][16] for n = kTiles tiles
// and up to kWideTokens tokens, or for n = 1 and up to kPanelTokens.
//
//   unit.Begin<n>(tokens)    C = 0
//   unit.Step<n>(panel, distance, a)
//                            C += a[tokens][kPanelStep] * panel[n][kPanelStep / 2], where the pairs
//                            of tiles are `distance` apart
//   unit.End<n>(c)           c = C
//
// The int8 path multiplies bytes for up to Isa::kQuadCrossover tokens of an expert only.
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

// What the paths of bytes need besides: products of unsigned weight bytes with signed activation
// bytes.
//
// Isa::ByteTable   bytes of the sixteen 4-bit codes
// Isa::Quad        four weights of every row of a tile, in the order kQuadOrder
// Isa::QuadSum     sums of products of quads, modulo 2^16 or 2^32: exact if they end within
//                  kQuadSumLimit. Of 16 bits there are two, one of each half of the quads.
//
// StartSum takes the bits that sums start with. Where they are narrow (kHasNarrowQuadSums), those
// of digits start with zero, and FinishDigits adds the start; elsewhere it does not.
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
      { Isa::kDigitTokens } -> std::convertible_to<int>;         // most that digits are fastest for
      { Isa::kPreciseDigitTokens } -> std::convertible_to<int>;  // if all groups have three digits
    };

// What the digit kernel needs besides, on ISAs that have it.
template <class Isa>
concept DigitIsa =
    ByteIsa<Isa> && (Isa::kDigitTokens > 0) &&
    requires(const typename Isa::QuadSum (&two)[2], const typename Isa::QuadSum (&three)[3]) {
      { Isa::template FinishDigits<7>(two, int32_t{}) } -> std::same_as<typename Isa::Vec>;
      {
        Isa::template FinishDigits<7>(three, int32_t{})
      } -> std::same_as<typename Isa::Vec>;  // (three[0] * 2^7 + three[1]) * 2^7 + ...
    };

// Whether sums of quads are of 16 bits.
template <class Isa>
inline constexpr bool kHasNarrowQuadSums =
    Isa::kQuadSumLimit <= std::numeric_limits<int16_t>::max();

// How a format's packed tile becomes multiplicands on an ISA. A codec whose group scales multiply
// the multiplicands exactly also has FoldScales and DecodeFolded; where they are missing, or a
// matrix has a scale that leaves the multiplicand's range (Isa::FoldsExactly), scales are applied
// to the fp32 sum of each group.
template <class C, class Isa>
concept TileCodec = VectorIsa<Isa> && requires(const C codec, typename Isa::Codes codes,
                                               const typename C::Format::Scale* scales) {
  { codec.template Decode<0>(codes) } -> std::same_as<typename Isa::Pair>;
  { codec.GroupScales(scales) } -> std::same_as<typename Isa::Vec>;
};

template <class C, class Isa>
concept FoldingCodec =
    TileCodec<C, Isa> && requires(const C codec, typename Isa::Codes codes, typename Isa::Fold fold,
                                  const typename C::Format::Scale* scales) {
      { codec.FoldScales(scales) } -> std::same_as<typename Isa::Fold>;
      { codec.template DecodeFolded<0>(codes, fold) } -> std::same_as<typename Isa::Pair>;
    };

// The values of a table that is to be folded, none of them minus zero.
constexpr std::array<float, 16> TimesFoldUnit(std::array<float, 16> values, float unit) {
  for (float& value : values) value = value * unit + 0.0f;
  return values;
}

}  // namespace cpumoe
