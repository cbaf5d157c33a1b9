// AVX-512 F/BW/DQ/VL: fp32 multiply-adds, sixteen rows of a tile in one register.
//
// One VPERMPS turns a code into an fp32 multiplicand. 32-bit lanes index a table of sixteen, and
// only the low four bits of an index count. So a shift selects the code, and no mask is needed.
//
// E4M3 codes become bf16 pairs first. Sign, exponent and mantissa move to their places by a shift
// of 16-bit words. An addition then corrects the exponent's bias. What it adds for subnormal
// numbers comes from a table, by VPERMW under a mask.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/float_types.h"
#include "kernels/isa.h"
#include "kernels/tile.h"

namespace cpumoe {

struct Avx512 : Fp32Multiplicands {
  // Register budget (32). Panel: sums of 14 tokens x 2 tiles, two multiplicands and a broadcast
  // activation. (With whole pairs GCC 12 copies a register per token.) Fused: 12 tokens, because
  // codes and table need registers, too.
  static constexpr bool kSplitsPairs = true;
  static constexpr int kTiles = 2;
  static constexpr int kFusedTokens = 12;
  static constexpr int kUnscaledFusedTokens = kFusedTokens;
  static constexpr int kFusedLimit = kFusedTokens;
  static constexpr int kPanelTokens = 14;
  // 32 KiB of fp32. With half of it, loading and storing C costs twice as much.
  static constexpr int kPanelPairs = 128;
  static constexpr int kDigitLimit = 32;  // with 48 tokens panels are as fast
  static constexpr int kPreciseDigitLimit = 2;
  static constexpr int kQuadTokens = 12;
  static constexpr int32_t kQuadSumLimit = std::numeric_limits<int16_t>::max();
  static constexpr bool kQuadDotIsOneInstruction = false;

  using Vec = __m512;
  struct Pair {
    __m512 even, odd;
  };
  struct Codes {
    __m512i words;
  };
  struct Table16 {
    __m512 values;
  };
  using Fold = Vec;
  using Quad = Codes;
  struct ByteTable {
    __m512i bytes;  // all sixteen in every 128 bits
  };
  struct QuadSum {
    // Two 16-bit sums per row: one of the first two bytes, one of the second two.
    __m512i words;
  };

  static constexpr int kRegisterBytes = 64;
  static void Stream(std::byte* to, const std::byte* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void FinishStreams() { _mm_sfence(); }

  static Vec Zero() { return _mm512_setzero_ps(); }
  static Vec Load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec Load(const Bf16* p) { return LoadScales(p); }
  static Vec Load(const Fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static void StoreActivations(Activation* p, Vec v) { Store(p, v); }
  static Vec Broadcast(float x) { return _mm512_set1_ps(x); }
  static Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec Round(Vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec Ldexp(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }

  static Vec LoadScales(const E8M0* p) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    // Byte 0 is 2^-127. As fp32 this is subnormal, and its only bit is the highest of the mantissa.
    return _mm512_castsi512_ps(
        _mm512_max_epi32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000)));
  }
  static Vec LoadScales(const Bf16* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static Vec LoadScales(const UE5M3* p) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    // Five exponent bits as the lower ones of fp32. No byte is subnormal so.
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bytes, 20)),
                         _mm512_set1_ps(0x1p112f));
  }

  static Codes LoadCodes(const std::byte* p) { return {_mm512_loadu_si512(p)}; }
  static Table16 MakeTable(const std::array<float, 16>& values) {
    return {_mm512_loadu_ps(values.data())};
  }
  template <int kPair>
  static Pair Lookup(Table16 table, Codes codes) {
    constexpr int kShift = PairShift<4>(kPair);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.words, kShift), table.values),
            _mm512_permutexvar_ps(_mm512_srli_epi32(codes.words, 16 + kShift), table.values)};
  }

  static Pair FromBf16(Codes codes) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(codes.words, 16)),
            _mm512_castsi512_ps(
                _mm512_and_si512(codes.words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  // One permutation brings the even codes to the lower half and the odd codes to the upper half.
  static Pair FromFp16(Codes codes) {
    const __m512i halves = _mm512_permutexvar_epi16(EvenThenOdd(), codes.words);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
  }
  template <int kPair>
  static Pair FromE4M3(Codes codes) {
    return FromBf16({E4M3ToBf16<kPair>(codes.words)});
  }

  static Vec Dot(Vec sum, Pair w, const Activation* a) {
    sum = _mm512_fmadd_ps(w.even, _mm512_set1_ps(a[0]), sum);
    return _mm512_fmadd_ps(w.odd, _mm512_set1_ps(a[1]), sum);
  }

  template <class Scale>
  static Fold LoadFold(const Scale* p) {
    return LoadScales(p);
  }
  static Pair Multiply(Pair w, Fold f) {
    return {_mm512_mul_ps(w.even, f), _mm512_mul_ps(w.odd, f)};
  }

  static ByteTable MakeByteTable(const std::array<uint8_t, 16>& bytes) {
    return {
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes.data())))};
  }
  template <int kQuad>
  static Quad LookupQuad(ByteTable table, Codes codes) {
    const __m512i shifted = kQuad == 0 ? codes.words : _mm512_srli_epi16(codes.words, 4);
    return {_mm512_shuffle_epi8(table.bytes, _mm512_and_si512(shifted, _mm512_set1_epi8(0x0f)))};
  }
  static QuadSum StartSum(int32_t start) { return {_mm512_set1_epi32(start)}; }
  static QuadSum DotQuad(QuadSum sum, Quad w, const int8_t* a) {
    sum.words = _mm512_add_epi16(sum.words, _mm512_maddubs_epi16(w.words, BroadcastQuad(a)));
    // Keeps the order of additions. The compiler may otherwise reassociate integer sums into trees
    // that need more registers than there are.
    asm("" : "+v"(sum.words));
    return sum;
  }
  static Vec FinishSum(QuadSum sum) {
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(sum.words, _mm512_set1_epi16(1)));
  }
  // The multiplication that adds the two 16-bit sums of a row also shifts them.
  template <int kShift, int kDigits>
  static Vec FinishDigits(const QuadSum (&sums)[kDigits], int32_t start) {
    __m512i whole = _mm512_set1_epi32(start);
    for (int p = 0; p < kDigits; ++p) {
      const __m512i worth = _mm512_set1_epi16(1 << kShift * (kDigits - 1 - p));
      whole = _mm512_add_epi32(whole, _mm512_madd_epi16(sums[p].words, worth));
    }
    return _mm512_cvtepi32_ps(whole);
  }

 protected:
  template <int kPair>
  static __m512i E4M3ToBf16(__m512i codes) {
    // bf16 bits minus magnitude << 4, for the magnitudes 0 to 7, which are multiples of 2^-9.
    const __m512i subnormal = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0, 0x3af0, 0x3b60, 0x3b90, 0x3bc0, 0x3bd0, 0x3be0, 0x3bf0));
    const __m512i normal = _mm512_set1_epi16(0x3c00);
    const __mmask32 is_subnormal =
        _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(kPair == 0 ? 0x0078 : 0x7800));
    const __m512i index = kPair == 0 ? codes : _mm512_srli_epi16(codes, 8);
    const __m512i added = _mm512_mask_permutexvar_epi16(normal, is_subnormal, index, subnormal);
    const __m512i placed = _mm512_srai_epi16(kPair == 0 ? _mm512_slli_epi16(codes, 8) : codes, 4);
    const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(0x87f0));
    return _mm512_add_epi16(_mm512_and_si512(placed, kept), added);
  }
  static __m512i EvenThenOdd() {
    alignas(64) static constexpr int16_t kPlaces[32] = {
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,  //
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    return _mm512_load_si512(kPlaces);
  }
  static __m512i BroadcastQuad(const int8_t* a) {
    int32_t quad;
    std::memcpy(&quad, a, sizeof(quad));
    return _mm512_set1_epi32(quad);
  }
};

}  // namespace cpumoe
