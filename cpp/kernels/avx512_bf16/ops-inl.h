// AVX512_BF16: VDPBF16PS multiplies 32 bf16 pairs and adds them to sixteen fp32 sums.
//
// A packed vector is 32 half-words of four codes. VPERMW looks up the lowest code of each half-word
// in a table of 32 bf16. The table holds the sixteen values twice, so that bit 4 of an index does
// not matter. Four permutes, one shift and two shuffles turn 64 packed bytes into 128
// multiplicands.
//
// VDPBF16PS treats denormal inputs as zero and ignores MXCSR. FoldsExactly therefore refuses
// products that are denormal.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/avx512_vnni/ops-inl.h"

namespace cpumoe {

struct Avx512Bf16 : Avx512Vnni {
  using Wide = Avx512Vnni;  // with fp32 activations
  static constexpr bool kSplitsPairs = false;
  static constexpr int kDigitLimit = 1;  // with more, VDPBF16PS is faster on AMD
  static constexpr int kPreciseDigitLimit = kDigitLimit;

  using Activation = Bf16;
  struct Pair {
    __m512i words;  // lane r: bf16 of k in the low half, bf16 of k+1 in the high half
  };
  struct Table16 {
    __m512i values;
  };
  // A table for folding holds values 2^120 times as large, so that applying a scale only ever
  // subtracts from exponents. Subtraction can saturate at zero, so that zero stays zero. Addition
  // cannot.
  static constexpr float kFoldUnit = 0x1p120f;
  struct Fold {
    // 120 minus the scale's exponent, at the place of the bf16 exponent, in both half-words.
    __m512i exponents;
  };

  static Table16 MakeTable(const std::array<float, 16>& values) {
    alignas(64) uint16_t twice[32];
    for (int i = 0; i < 32; ++i) twice[i] = Bf16::FromFloat(values[i % 16]).bits;
    return {_mm512_load_si512(twice)};
  }
  template <int kPair>
  static Pair Lookup(Table16 table, Codes codes) {
    constexpr int kShift = PairShift<4>(kPair);
    const __m512i index = kShift < 8 ? _mm512_srli_epi16(codes.words, kShift)
                                     : UpperBytes(_mm512_srli_epi16(codes.words, kShift - 8));
    return {_mm512_permutexvar_epi16(index, table.values)};
  }

  static Pair FromBf16(Codes codes) { return {codes.words}; }
  template <int kPair>
  static Pair FromE4M3(Codes codes) {
    return {E4M3ToBf16<kPair>(codes.words)};
  }

  static Vec Dot(Vec sum, Pair w, const Activation* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return _mm512_dpbf16_ps(sum, (__m512bh)w.words, (__m512bh)_mm512_set1_epi32(pair));
  }

  // A power of two folds into the exponent of bf16. Other scales need more bits than bf16 has.
  static Fold LoadFold(const E8M0* p) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(127 + 120), bytes);
    return {_mm512_or_si512(_mm512_slli_epi32(less, 7), _mm512_slli_epi32(less, 16 + 7))};
  }
  static Pair Multiply(Pair w, Fold f) { return {_mm512_subs_epu16(w.words, f.exponents)}; }
  // Scales of few bits multiply in fp32. The products are bf16 numbers.
  static Vec LoadFold(const UE5M3* p) { return LoadScales(p); }
  static Pair Multiply(Pair w, Vec scales) {
    const Avx512::Pair wide = Avx512::FromBf16({w.words});
    const __m512i even = _mm512_castps_si512(_mm512_mul_ps(wide.even, scales));
    const __m512i odd = _mm512_castps_si512(_mm512_mul_ps(wide.odd, scales));
    return {_mm512_or_si512(_mm512_srli_epi32(even, 16), odd)};
  }
  // Whether all products, of magnitude `least` to `greatest`, are normal bf16 numbers and come from
  // scales of at most kFoldUnit.
  static constexpr bool FoldsExactly(float least, float greatest) {
    return least >= 0x1p-126f && greatest <= kFoldUnit;
  }

  static Activation ToActivation(float x) { return Bf16::FromFloat(x); }
  static void StoreActivations(Activation* p, Vec v) {
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &rounded, sizeof(rounded));
  }

 private:
  // Shifts words right by 8. A shuffle is used, because shifts and half of VPERMW compete for one
  // of Intel's two ports.
  static __m512i UpperBytes(__m512i words) {
    return _mm512_shuffle_epi8(
        words, _mm512_broadcast_i32x4(
                   _mm_setr_epi8(1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15, -1)));
  }
};

}  // namespace cpumoe
