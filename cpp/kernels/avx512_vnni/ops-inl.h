// AVX512_VNNI: VPDPBUSD multiplies 64 pairs of bytes and adds them to sixteen 32-bit sums. It
// serves the paths of bytes; otherwise this is AVX-512.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/avx512/ops-inl.h"

namespace cpumoe {

struct Avx512Vnni : Avx512 {
  static constexpr int kPlaneTokens = 16;  // a further one takes 20 cycles, in fp32 19
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
  static Vec FinishSum(QuadSum sum, int32_t /*start*/) { return _mm512_cvtepi32_ps(sum.lanes); }
  template <int kShift>
  static Vec FinishPlanes(const QuadSum (&sums)[3], int32_t /*start*/) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums[0].lanes, kShift), sums[1].lanes);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, kShift), sums[2].lanes));
  }
};

}  // namespace cpumoe
