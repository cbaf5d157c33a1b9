// AVX2 + FMA + F16C: a tile's sixteen rows are two registers of eight fp32.
//
// AVX2 has no wide permute for 4-bit codes, but byte shuffles look up sixteen codes per 128-bit
// half. For each half of a packed vector (four rows of four bytes):
//
//   bytes of a row            k0|k4   k2|k6   k1|k5   k3|k7     (low nibble | high nibble)
//   one shuffle gathers       (k0|k4 k1|k5) of four rows, then (k2|k6 k3|k7) of four rows
//   the nibbles look up the lower and the upper byte of their bf16 value, and unpacking
//   the two byte vectors yields bf16 pairs (k, k+1), one 32-bit lane per row.
//
// A bf16 pair becomes two fp32: the pair shifted left by 16, and the pair with its low half
// cleared.
//
// E4M3 codes become bf16 pairs, too. Sign, exponent and mantissa move to their places by a shift of
// 16-bit words. An addition then corrects the exponent's bias. What it adds for subnormal numbers
// is looked up by byte shuffles, whose index is the magnitude, or 8 for all normal numbers.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/float_types.h"
#include "kernels/isa.h"

namespace cpumoe {

struct Avx2 : Fp32Multiplicands {
  // Register budget (16), with two registers per Vec. Panel: 6 sums, half a Pair and a broadcast
  // activation. (With a whole Pair a sum is spilled, and each addition waits for the sum in
  // memory.) Fused: 3 sums, because decoding needs the other registers. Without scales: 6 sums,
  // as in a panel, because decoding half a Pair needs a mask alone.
  static constexpr bool kSplitsPairs = true;
  static constexpr int kTiles = 1;
  static constexpr int kFusedTokens = 3;
  static constexpr int kUnscaledFusedTokens = 6;
  static constexpr int kFusedLimit = 18;  // with 24 tokens panels are as fast
  static constexpr int kPanelTokens = 6;
  static constexpr int kPanelPairs = 256;  // 32 KiB of fp32
  static constexpr int kDigitLimit = 32;   // with 48 tokens panels are as fast
  static constexpr int kPreciseDigitLimit = 9;
  static constexpr int kQuadTokens = 4;  // 8 sums
  static constexpr int32_t kQuadSumLimit = std::numeric_limits<int16_t>::max();
  static constexpr bool kQuadDotIsOneInstruction = false;

  struct Vec {
    __m256 lo, hi;  // rows 0-7 and 8-15
  };
  struct Pair {
    Vec even, odd;
  };
  struct Codes {
    __m256i lo, hi;
  };
  struct Table16 {
    __m256i lower, upper;  // bytes of the values' bf16; both halves are alike
  };
  using Fold = Vec;
  using Quad = Codes;
  using ByteTable = __m256i;  // both halves are alike
  struct QuadSum {
    // Two 16-bit sums per row: one of the first two bytes, one of the second two.
    __m256i lo, hi;
  };

  static constexpr int kRegisterBytes = 32;
  static void Stream(std::byte* to, const std::byte* from) {
    for (int i = 0; i < kVectorBytes; i += kRegisterBytes) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    }
  }
  static void FinishStreams() { _mm_sfence(); }

  static Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vec Load(const Bf16* p) { return LoadScales(p); }
  static Vec Load(const Fp16* p) {
    const auto* halves = reinterpret_cast<const __m128i*>(p);
    return {FromFp16(_mm_loadu_si128(halves)), FromFp16(_mm_loadu_si128(halves + 1))};
  }
  static void Store(float* p, Vec v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }
  static void StoreActivations(Activation* p, Vec v) { Store(p, v); }
  static Vec Broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec Add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static Vec Mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static Vec Div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static Vec Fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static Vec Min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static Vec Round(Vec v) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(v.lo, kNearest), _mm256_round_ps(v.hi, kNearest)};
  }
  static Vec Ldexp(Vec v, Vec n) { return {Ldexp(v.lo, n.lo), Ldexp(v.hi, n.hi)}; }

  static Vec LoadScales(const E8M0* p) { return {LoadScales8(p), LoadScales8(p + 8)}; }
  static Vec LoadScales(const Bf16* p) { return {LoadScales8(p), LoadScales8(p + 8)}; }
  static Vec LoadScales(const UE5M3* p) { return {LoadScales8(p), LoadScales8(p + 8)}; }

  static Codes LoadCodes(const std::byte* p) {
    const auto* vectors = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
  }
  static Table16 MakeTable(const std::array<float, 16>& values) {
    alignas(16) uint8_t lower[16], upper[16];
    for (int i = 0; i < 16; ++i) {
      const uint16_t bits = Bf16::FromFloat(values[i]).bits;
      lower[i] = static_cast<uint8_t>(bits);
      upper[i] = static_cast<uint8_t>(bits >> 8);
    }
    return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(lower))),
            _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(upper)))};
  }
  template <int kPair>
  static Pair Lookup(Table16 table, Codes codes) {
    const __m256i lo = LookupBf16<kPair>(table, codes.lo);
    const __m256i hi = LookupBf16<kPair>(table, codes.hi);
    return {{Even(lo), Even(hi)}, {Odd(lo), Odd(hi)}};
  }

  static Pair FromBf16(Codes codes) {
    return {{Even(codes.lo), Even(codes.hi)}, {Odd(codes.lo), Odd(codes.hi)}};
  }

  static Pair FromFp16(Codes codes) {
    const __m256i lo = EvenThenOdd(codes.lo), hi = EvenThenOdd(codes.hi);
    return {{FromFp16(_mm256_castsi256_si128(lo)), FromFp16(_mm256_castsi256_si128(hi))},
            {FromFp16(_mm256_extracti128_si256(lo, 1)), FromFp16(_mm256_extracti128_si256(hi, 1))}};
  }
  template <int kPair>
  static Pair FromE4M3(Codes codes) {
    const __m256i lo = E4M3ToBf16<kPair>(codes.lo);
    const __m256i hi = E4M3ToBf16<kPair>(codes.hi);
    return {{Even(lo), Even(hi)}, {Odd(lo), Odd(hi)}};
  }

  static Vec Dot(Vec sum, Pair w, const Activation* a) {
    return Fma(w.odd, Broadcast(a[1]), Fma(w.even, Broadcast(a[0]), sum));
  }

  template <class Scale>
  static Fold LoadFold(const Scale* p) {
    return LoadScales(p);
  }
  static Pair Multiply(Pair w, Fold f) { return {Mul(w.even, f), Mul(w.odd, f)}; }

  static ByteTable MakeByteTable(const std::array<uint8_t, 16>& bytes) {
    return _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes.data())));
  }
  template <int kQuad>
  static Quad LookupQuad(ByteTable table, Codes codes) {
    return {LookupQuad32<kQuad>(table, codes.lo), LookupQuad32<kQuad>(table, codes.hi)};
  }
  static QuadSum StartSum(int32_t start) {
    return {_mm256_set1_epi32(start), _mm256_set1_epi32(start)};
  }
  static QuadSum DotQuad(QuadSum sum, Quad w, const int8_t* a) {
    const __m256i x = BroadcastQuad(a);
    sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.lo, x));
    sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.hi, x));
    // Keeps the order of additions. The compiler may otherwise reassociate integer sums into trees
    // that need more registers than there are.
    asm("" : "+x"(sum.lo), "+x"(sum.hi));
    return sum;
  }
  static Vec FinishSum(QuadSum sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(sum.lo, ones)),
            _mm256_cvtepi32_ps(_mm256_madd_epi16(sum.hi, ones))};
  }
  // The multiplication that adds the two 16-bit sums of a row also shifts them.
  template <int kShift, int kDigits>
  static Vec FinishDigits(const QuadSum (&sums)[kDigits], int32_t start) {
    Codes whole = {_mm256_set1_epi32(start), _mm256_set1_epi32(start)};
    for (int p = 0; p < kDigits; ++p) {
      const __m256i worth = _mm256_set1_epi16(1 << kShift * (kDigits - 1 - p));
      whole.lo = _mm256_add_epi32(whole.lo, _mm256_madd_epi16(sums[p].lo, worth));
      whole.hi = _mm256_add_epi32(whole.hi, _mm256_madd_epi16(sums[p].hi, worth));
    }
    return {_mm256_cvtepi32_ps(whole.lo), _mm256_cvtepi32_ps(whole.hi)};
  }

 protected:
  static __m256i BroadcastQuad(const int8_t* a) {
    int32_t quad;
    std::memcpy(&quad, a, sizeof(quad));
    return _mm256_set1_epi32(quad);
  }

 private:
  template <int kQuad>
  static __m256i LookupQuad32(ByteTable table, __m256i codes) {
    const __m256i shifted = kQuad == 0 ? codes : _mm256_srli_epi16(codes, 4);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(shifted, _mm256_set1_epi8(0x0f)));
  }
  // Multiplies by 2^n in two factors, so that results beyond either end of the exponent range are
  // correct.
  static __m256 Ldexp(__m256 v, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(v, PowerOfTwo(half)),
                         PowerOfTwo(_mm256_sub_epi32(whole, half)));
  }
  static __m256 PowerOfTwo(__m256i n) {
    const __m256i biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static __m256 LoadScales8(const E8M0* p) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    // Byte 0 is 2^-127. As fp32 this is subnormal, and its only bit is the highest of the mantissa.
    return _mm256_castsi256_ps(
        _mm256_max_epi32(_mm256_slli_epi32(bytes, 23), _mm256_set1_epi32(0x00400000)));
  }
  static __m256 LoadScales8(const UE5M3* p) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    // Five exponent bits as the lower ones of fp32. No byte is subnormal so.
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bytes, 20)),
                         _mm256_set1_ps(0x1p112f));
  }
  static __m256 LoadScales8(const Bf16* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  template <int kPair>
  static __m256i LookupBf16(Table16 table, __m256i codes) {
    const __m256i gather = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i bytes = _mm256_shuffle_epi8(codes, gather);
    const __m256i nibbles =
        _mm256_and_si256(kPair < 2 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(0x0f));
    const __m256i lower = _mm256_shuffle_epi8(table.lower, nibbles);
    const __m256i upper = _mm256_shuffle_epi8(table.upper, nibbles);
    return kPair % 2 == 0 ? _mm256_unpacklo_epi8(lower, upper) : _mm256_unpackhi_epi8(lower, upper);
  }
  template <int kPair>
  static __m256i E4M3ToBf16(__m256i codes) {
    // Bytes of bf16 bits minus magnitude << 4. Magnitude 1 is 2^-9, and so on.
    const __m256i lower = _mm256_setr_epi8(
        0, -0x10, 0x60, -0x70, -0x40, -0x30, -0x20, -0x10, 0, 0, 0, 0, 0, 0, 0, 0,  //
        0, -0x10, 0x60, -0x70, -0x40, -0x30, -0x20, -0x10, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i upper =
        _mm256_setr_epi8(0, 0x3a, 0x3b, 0x3b, 0x3b, 0x3b, 0x3b, 0x3b, 0x3c, 0, 0, 0, 0, 0, 0, 0,  //
                         0, 0x3a, 0x3b, 0x3b, 0x3b, 0x3b, 0x3b, 0x3b, 0x3c, 0, 0, 0, 0, 0, 0, 0);
    const __m256i index =
        _mm256_min_epu8(_mm256_and_si256(codes, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(8));
    const __m256i low = _mm256_shuffle_epi8(lower, index);
    const __m256i high = _mm256_shuffle_epi8(upper, index);
    const __m256i low_byte = _mm256_set1_epi16(0xff);
    const __m256i added =
        kPair == 0
            ? _mm256_or_si256(_mm256_and_si256(low, low_byte), _mm256_slli_epi16(high, 8))
            : _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(low_byte, high));
    const __m256i placed = _mm256_srai_epi16(kPair == 0 ? _mm256_slli_epi16(codes, 8) : codes, 4);
    const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0x87f0));
    return _mm256_add_epi16(_mm256_and_si256(placed, kept), added);
  }
  // Brings the even half-words to the lower half and the odd ones to the upper half.
  static __m256i EvenThenOdd(__m256i pairs) {
    const __m256i gather = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, gather), 0b11011000);
  }
  static __m256 FromFp16(__m128i halves) { return _mm256_cvtph_ps(halves); }
  static __m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static __m256 Odd(__m256i pairs) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

}  // namespace cpumoe
