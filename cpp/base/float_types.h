// Storage types of low-precision floating point numbers and their exact scalar conversions.
//
// Kernels convert with vector instructions and are tested against these definitions. Cold paths
// (packing, the reference) use the definitions directly.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

#include "base/strict_math.h"

namespace cpumoe {

// bfloat16: the upper half of an IEEE binary32.
struct Bf16 {
  uint16_t bits;

  float ToFloat() const { return std::bit_cast<float>(uint32_t{bits} << 16); }

  // Rounds to nearest, ties to even. A NaN becomes a quiet NaN.
  static Bf16 FromFloat(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};

// IEEE binary16.
struct Fp16 {
  uint16_t bits;

  float ToFloat() const {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity and NaN
      return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    }
    // The exponent of the shifted bits is 112 too small. The product is exact, for subnormals too.
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
  }

  // Rounds to nearest, ties to even. Overflow gives infinity, and a NaN becomes a quiet NaN.
  static Fp16 FromFloat(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
      // Below 2^-14: adding 0.5 makes the float adder round at the subnormal's last place, 2^-24.
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
};

// E8M0 of the OCP Microscaling (MX) formats 1.0: byte b is 2^(b-127), and byte 255 is NaN. The type
// has no zero.
struct E8M0 {
  uint8_t bits;

  bool IsNan() const { return bits == 0xff; }
  float ToFloat() const {
    if (IsNan()) return std::bit_cast<float>(0x7fc00000u);
    return std::bit_cast<float>(bits == 0 ? 0x00400000u : uint32_t{bits} << 23);
  }
  // Exact, as a subnormal number where the power of two is one in bf16. NaN stays NaN.
  Bf16 ToBf16() const {
    const bool is_special = bits == 0 || IsNan();  // 2^-127, NaN
    return {static_cast<uint16_t>((bits << 7) | (is_special ? 0x40 : 0))};
  }
};

// IEEE binary32, as a type of scales.
struct Fp32 {
  float value;

  float ToFloat() const { return value; }
};

// E4M3 of the OCP 8-bit floating point formats 1.0, as weights use it: one sign, four exponent bits
// (bias 7), three mantissa bits. There are no infinities. The greatest magnitude is NaN.
struct E4M3 {
  uint8_t bits;

  bool IsNan() const { return (bits & 0x7f) == 0x7f; }
  constexpr float ToFloat() const {
    const uint32_t exponent = (bits >> 3) & 0xf, mantissa = bits & 0x7;
    const uint32_t sign = uint32_t{bits & 0x80u} << 24;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
      return sign == 0 ? magnitude : -magnitude;
    }
    if ((bits & 0x7f) == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
    return std::bit_cast<float>(sign | ((exponent + 120) << 23) | (mantissa << 20));
  }
};

// An unsigned number of five exponent bits (bias 15) and three mantissa bits, as a type of packed
// scales. It has every number of E4M3 that is not negative. Byte 0 is zero, and bytes 1 to 7 are
// not used, so that kernels need no case for subnormal numbers.
struct UE5M3 {
  uint8_t bits;

  constexpr float ToFloat() const {
    return bits == 0 ? 0.0f : std::bit_cast<float>((uint32_t{bits} << 20) + (112u << 23));
  }
};

// The scale type of weights that have no scales. It takes no memory.
struct NoScale {
  float ToFloat() const { return 1.0f; }
};

template <class Format>
concept HasScales = !std::same_as<typename Format::Scale, NoScale>;

// Successive k that share a scale in packed tiles: a format's kPackedDepth, or 32.
template <class F>
inline constexpr int kPackedDepthOf = 32;
template <class F>
  requires requires { F::kPackedDepth; }
inline constexpr int kPackedDepthOf<F> = F::kPackedDepth;

// The type of scales in packed tiles: a format's PackedScale, or the type of stored scales.
template <class F>
struct PackedScaleTraits {
  using Type = typename F::Scale;
};
template <class F>
  requires requires { typename F::PackedScale; }
struct PackedScaleTraits<F> {
  using Type = typename F::PackedScale;
};
template <class F>
using PackedScaleOf = typename PackedScaleTraits<F>::Type;

// The bytes of one scale.
template <class Scale>
inline constexpr int64_t kBytesOfScale = std::same_as<Scale, NoScale> ? 0 : sizeof(Scale);

// Element types of the tensors that a host hands in and gets back.
enum class DType : int32_t { kBf16, kFp16, kFp32 };

constexpr int64_t ByteSize(DType dtype) { return dtype == DType::kFp32 ? 4 : 2; }

// Calls visitor(pointer) with `elements` as a pointer to its element type.
template <class Visitor>
void VisitElements(DType dtype, const void* elements, Visitor&& visitor) {
  switch (dtype) {
    case DType::kBf16:
      return visitor(static_cast<const Bf16*>(elements));
    case DType::kFp16:
      return visitor(static_cast<const Fp16*>(elements));
    case DType::kFp32:
      return visitor(static_cast<const float*>(elements));
  }
}

}  // namespace cpumoe
