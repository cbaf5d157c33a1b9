// AVX512_VNNI: VPDPBUSD multiplies 64 pairs of bytes and adds them to sixteen 32-bit sums. It
// serves the byte paths. Everything else is as on AVX-512.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/avx512/ops-inl.h"

namespace cpumoe {

struct Avx512Vnni : Avx512 {
  static constexpr int kDigitLimit = kAnyTokens;  // a third faster than panels
  static constexpr int kPreciseDigitLimit = kAnyTokens;
  static constexpr int32_t kQuadSumLimit = std::numeric_limits<int32_t>::max();
  static constexpr bool kQuadDotIsOneInstruction = true;

  struct QuadSum {
    __m512i lanes;
  };

  static QuadSum StartSum(int32_t start) { return {_mm512_set1_epi32(start)}; }
  static QuadSum DotQuad(QuadSum sum, Quad w, const int8_t* a) {
    sum.lanes = _mm512_dpbusd_epi32(sum.lanes, w.words, BroadcastQuad(a));
    asm("" : "+v"(sum.lanes));
    return sum;
  }
  static Vec FinishSum(QuadSum sum) { return _mm512_cvtepi32_ps(sum.lanes); }
  template <int kShift, int kDigits>
  static Vec FinishDigits(const QuadSum (&sums)[kDigits], int32_t /*start*/) {
    __m512i whole = sums[0].lanes;
    for (int p = 1; p < kDigits; ++p) {
      whole = _mm512_add_epi32(_mm512_slli_epi32(whole, kShift), sums[p].lanes);
    }
    return _mm512_cvtepi32_ps(whole);
  }
};

}  // namespace cpumoe
