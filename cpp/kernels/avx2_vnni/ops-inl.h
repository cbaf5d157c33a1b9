// AVX-VNNI: VPDPBUSD in two registers of eight rows, for CPUs without AVX-512 (Intel's since Alder
// Lake). VPDPBUSD multiplies 32 pairs of bytes and adds all four products of a row to one of eight
// 32-bit sums. AVX2 needs two instructions for that, and sums only two products each. VPDPBUSD
// serves the byte paths. Everything else is as on AVX2.
//
// Register budget (16): ten sums, two registers of weights and a broadcast activation. The fused
// kernel reads codes and constants from memory.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/avx2/ops-inl.h"

namespace cpumoe {

struct Avx2Vnni : Avx2 {
  // A further token's 512 products take 32 VPDPBUSD and 10 other instructions with two digits (8 of
  // the 10 on VPDPBUSD's two ports), 48 and 14 with three digits, and 64 multiply-adds in panels.
  static constexpr int kDigitLimit = kAnyTokens;
  static constexpr int kPreciseDigitLimit = kAnyTokens;
  static constexpr int kQuadTokens = 5;  // ten sums hide five cycles of latency on two units
  static constexpr int32_t kQuadSumLimit = std::numeric_limits<int32_t>::max();
  static constexpr bool kQuadDotIsOneInstruction = true;

  struct QuadSum {
    __m256i lo, hi;
  };

  static QuadSum StartSum(int32_t start) {
    return {_mm256_set1_epi32(start), _mm256_set1_epi32(start)};
  }
  static QuadSum DotQuad(QuadSum sum, Quad w, const int8_t* a) {
    const __m256i x = BroadcastQuad(a);
    sum.lo = _mm256_dpbusd_avx_epi32(sum.lo, w.lo, x);
    sum.hi = _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x);
    asm("" : "+x"(sum.lo), "+x"(sum.hi));
    return sum;
  }
  static Vec FinishSum(QuadSum sum) {
    return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)};
  }
  template <int kShift, int kDigits>
  static Vec FinishDigits(const QuadSum (&sums)[kDigits], int32_t /*start*/) {
    QuadSum whole = sums[0];
    for (int p = 1; p < kDigits; ++p) {
      whole.lo = _mm256_add_epi32(_mm256_slli_epi32(whole.lo, kShift), sums[p].lo);
      whole.hi = _mm256_add_epi32(_mm256_slli_epi32(whole.hi, kShift), sums[p].hi);
    }
    return FinishSum(whole);
  }
};

}  // namespace cpumoe
