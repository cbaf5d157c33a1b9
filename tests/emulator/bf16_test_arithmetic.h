// A scalar model of bf16 arithmetic in portable C++, and random operands for it. The model shares
// nothing with the emulator. avx512_bf16.cc and amx_tiles.cc name the semantics and their source.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <random>

namespace cpumoe::emulator {

inline bool IsNan(uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }

inline double ValueWithDenormalsAsZero(uint32_t bits) {
  return std::bit_cast<float>((bits & 0x7F800000) == 0 ? bits & 0x80000000 : bits);
}

// Returns x * y + z, rounded once to nearest even, with denormals as zero, for x and y that are
// bf16. The product is exact in double. If the sum in double is inexact it is made odd, so that
// rounding it again to float rounds correctly (Boldo and Melquiond, 2008).
inline uint32_t ModelFma(uint32_t x, uint32_t y, uint32_t z) {
  for (uint32_t bits : std::initializer_list<uint32_t>{x, y, z}) {
    if (IsNan(bits)) return bits | 0x00400000;
  }
  const double product = ValueWithDenormalsAsZero(x) * ValueWithDenormalsAsZero(y);
  const double addend = ValueWithDenormalsAsZero(z);
  double sum = product + addend;
  if (std::isnan(sum)) return 0xFFC00000;
  if (std::isinf(sum)) return std::bit_cast<uint32_t>(static_cast<float>(sum));
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  if (error != 0 && (std::bit_cast<uint64_t>(sum) & 1) == 0) {
    sum = std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
  }
  // x86 calls a result tiny if it is below the least normal number after rounding to 24 bits with
  // an unbounded exponent. Therefore this rounds far away from the denormals.
  const bool tiny = std::fabs(static_cast<float>(std::ldexp(sum, 64))) < std::ldexp(1.0, -126 + 64);
  return std::bit_cast<uint32_t>(static_cast<float>(tiny ? std::copysign(0.0, sum) : sum));
}

inline uint32_t ModelDot(uint32_t a, uint32_t b, uint32_t sum) {
  const uint32_t odd = ModelFma(a & 0xFFFF0000, b & 0xFFFF0000, sum);
  return ModelFma(a << 16, b << 16, odd);
}

inline uint16_t ModelConvert(uint32_t bits) {
  const auto truncated = static_cast<uint16_t>(bits >> 16);
  if (IsNan(bits)) return truncated | 0x0040;
  if ((bits & 0x7F800000) == 0) return truncated & 0x8000;
  const uint32_t rest = bits & 0xFFFF;
  const bool up = rest > 0x8000 || (rest == 0x8000 && truncated % 2 == 1);
  return static_cast<uint16_t>(truncated + (up ? 1 : 0));
}

using Rng = std::mt19937_64;

// Returns a bf16 from a mix of values that makes sums cancel, round, overflow and vanish.
inline uint32_t RandomBf16(Rng& rng) {
  static constexpr uint16_t kSpecial[] = {0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F,
                                          0x7F80, 0xFF80, 0x7F81, 0xFFC1, 0x3F80};
  const uint64_t bits = rng();
  switch (bits >> 16 & 7) {
    case 0:
      return bits & 0xFFFF;
    case 1:
      return kSpecial[(bits >> 24) % std::size(kSpecial)];
    case 2:
      return (bits & 0x807F) | (62 + (bits >> 56) % 5) << 7;  // products around the least normal
    case 3:
      return (bits & 0x807F) | (bits >> 56) % 4 << 7;
    default:
      return (bits & 0x807F) | (120 + (bits >> 56) % 14) << 7;
  }
}

inline uint32_t RandomLane(Rng& rng) {
  static constexpr uint32_t kLow[] = {0x0000, 0x8000, 0x7FFF, 0x8001};
  const uint64_t choice = rng();
  const uint32_t low = (choice & 4) != 0 ? kLow[choice & 3] : RandomBf16(rng);
  return RandomBf16(rng) << 16 | low;
}

}  // namespace cpumoe::emulator
