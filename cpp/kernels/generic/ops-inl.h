// Portable C++ for any CPU, in vectors of 16 bytes. Compilers map such vectors to every SIMD unit,
// and split them if there is none.
//
// This class is the reference for the semantics of the other ISAs, and the fallback. It is correct
// but not fast. It looks up codes one at a time, because no portable operation permutes a vector by
// another.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/float_types.h"
#include "kernels/isa.h"
#include "kernels/tile.h"

namespace cpumoe {

struct Generic : Fp32Multiplicands {
  static constexpr int kTiles = 1;
  static constexpr int kFusedTokens = 2;
  static constexpr int kUnscaledFusedTokens = kFusedTokens;
  static constexpr int kFusedLimit = kFusedTokens;
  static constexpr int kPanelTokens = 2;
  static constexpr int kPanelPairs = 256;
  static constexpr bool kSplitsPairs = true;
  static constexpr int kDigitLimit = 0;
  static constexpr int kPreciseDigitLimit = 0;
  static constexpr int kQuadTokens = 2;
  static constexpr int32_t kQuadSumLimit = std::numeric_limits<int32_t>::max();
  static constexpr bool kQuadDotIsOneInstruction = false;

  static constexpr int kPartLanes = 4;
  static constexpr int kParts = kTileRows / kPartLanes;
  using Floats = float __attribute__((vector_size(16)));
  using Words = uint32_t __attribute__((vector_size(16)));
  using Integers = int32_t __attribute__((vector_size(16)));
  using Shorts = int16_t __attribute__((vector_size(16)));

  struct Vec {
    Floats part[kParts];
  };
  struct Pair {
    Vec even, odd;
  };
  // The address of the codes, which are looked up byte by byte.
  struct Codes {
    const std::byte* bytes;
  };
  // For each byte, the values of its low and its high code, so that a lookup need not split the
  // byte.
  template <class Value>
  using CodeTable = std::array<std::array<Value, 2>, 256>;
  using Table16 = CodeTable<float>;
  using Fold = Vec;
  // Bytes 0 and 2 of each row, and bytes 1 and 3, as 16-bit numbers.
  struct Quad {
    Shorts even[kParts], odd[kParts];
  };
  struct QuadSum {
    Integers part[kParts];
  };
  using ByteTable = CodeTable<uint8_t>;

  static constexpr int kRegisterBytes = 16;
  static void Stream(std::byte* to, const std::byte* from) { std::memcpy(to, from, kVectorBytes); }
  static void FinishStreams() {}

  static Vec Zero() { return Broadcast(0.0f); }
  static Vec Load(const float* p) {
    return Map([p](int i) {
      Floats part;
      std::memcpy(&part, p + i * kPartLanes, sizeof(part));
      return part;
    });
  }
  template <class Number>
  static Vec Load(const Number* p) {
    return MapLanes([p](int i) { return p[i].ToFloat(); });
  }
  static void Store(float* p, Vec v) {
    for (int i = 0; i < kParts; ++i) std::memcpy(p + i * kPartLanes, &v.part[i], sizeof(Floats));
  }
  static void StoreActivations(Activation* p, Vec v) { Store(p, v); }
  static Vec Broadcast(float x) {
    return Map([x](int) { return Splat(x); });
  }
  static Vec Add(Vec a, Vec b) {
    return Map([&](int i) { return a.part[i] + b.part[i]; });
  }
  static Vec Mul(Vec a, Vec b) {
    return Map([&](int i) { return a.part[i] * b.part[i]; });
  }
  static Vec Div(Vec a, Vec b) {
    return Map([&](int i) { return a.part[i] / b.part[i]; });
  }
  static Vec Fma(Vec a, Vec b, Vec c) {
    return Map([&](int i) { return a.part[i] * b.part[i] + c.part[i]; });
  }
  static Vec Min(Vec a, Vec b) {
    return Map([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
  }
  static Vec Max(Vec a, Vec b) {
    return Map([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
  }
  static Vec Round(Vec v) {
    return Map([&](int i) {
      // From 2^23 on every float is an integer. Adding 2^23 rounds a smaller float to an integer.
      const Floats unit = Splat(0x1p23f);
      const Words sign = std::bit_cast<Words>(v.part[i]) & 0x80000000u;
      const auto magnitude = std::bit_cast<Floats>(std::bit_cast<Words>(v.part[i]) ^ sign);
      const Floats rounded = magnitude < unit ? (magnitude + unit) - unit : magnitude;
      return std::bit_cast<Floats>(std::bit_cast<Words>(rounded) | sign);
    });
  }
  static Vec Ldexp(Vec v, Vec n) {
    return Map([&](int i) {
      // Multiplies in two factors, so that results beyond either end of the exponent range are
      // correct. A NaN cannot be converted to an integer, and the product keeps the NaN.
      const Floats exponent = n.part[i] == n.part[i] ? n.part[i] : Floats{};
      const auto whole = __builtin_convertvector(exponent, Integers);
      const Integers half = whole >> 1;
      return v.part[i] * PowerOfTwo(half) * PowerOfTwo(whole - half);
    });
  }

  template <class Scale>
  static Vec LoadScales(const Scale* p) {
    return MapLanes([p](int i) { return p[i].ToFloat(); });
  }

  static Codes LoadCodes(const std::byte* p) { return {p}; }
  static Pair FromBf16(Codes codes) {
    Pair pair;
    for (int i = 0; i < kParts; ++i) {
      Words words;
      std::memcpy(&words, codes.bytes + i * sizeof(words), sizeof(words));
      pair.even.part[i] = std::bit_cast<Floats>(words << 16);
      pair.odd.part[i] = std::bit_cast<Floats>(words & 0xffff0000u);
    }
    return pair;
  }
  static Pair FromFp16(Codes codes) {
    // The exponent of the shifted bits is 112 too small. The product is exact, for subnormals too.
    const auto number = [](Words sign, Words magnitude) {
      const Floats scaled = std::bit_cast<Floats>(magnitude) * Splat(0x1p112f);
      return std::bit_cast<Floats>(std::bit_cast<Words>(scaled) | (sign & 0x80000000u));
    };
    Pair pair;
    for (int i = 0; i < kParts; ++i) {
      Words words;
      std::memcpy(&words, codes.bytes + i * sizeof(words), sizeof(words));
      pair.even.part[i] = number(words << 16, (words & 0x7fffu) << 13);
      pair.odd.part[i] = number(words, (words >> 16 & 0x7fffu) << 13);
    }
    return pair;
  }
  template <int kPair>
  static Pair FromE4M3(const Codes& codes) {
    constexpr int kByte = PairShift<8>(kPair) / 8;
    asm volatile("" ::: "memory");  // as in Lookup
    return {MapLanes([&](int i) { return kE4M3Values[Byte(codes, i, kByte)]; }),
            MapLanes([&](int i) { return kE4M3Values[Byte(codes, i, kByte + 2)]; })};
  }
  static constexpr Table16 MakeTable(const std::array<float, 16>& values) {
    return MakeCodeTable(values);
  }
  template <int kPair>
  static Pair Lookup(const Table16& table, const Codes& codes) {
    constexpr int kShift = PairShift<4>(kPair);
    constexpr int kByte = kShift / 8, kHalf = kShift % 8 / 4;
    // Without this, compilers would keep the indices for the next pair, which are far more than
    // there are registers.
    asm volatile("" ::: "memory");
    return {MapLanes([&](int i) { return table[Byte(codes, i, kByte)][kHalf]; }),
            MapLanes([&](int i) { return table[Byte(codes, i, kByte + 2)][kHalf]; })};
  }

  static inline __attribute__((always_inline)) Vec Dot(Vec sum, Pair w, const Activation* a) {
    return Fma(w.odd, Broadcast(a[1]), Fma(w.even, Broadcast(a[0]), sum));
  }

  template <class Scale>
  static Fold LoadFold(const Scale* p) {
    return LoadScales(p);
  }
  static Pair Multiply(Pair w, Fold f) { return {Mul(w.even, f), Mul(w.odd, f)}; }

  static constexpr ByteTable MakeByteTable(const std::array<uint8_t, 16>& bytes) {
    return MakeCodeTable(bytes);
  }
  template <int kQuad>
  static Quad LookupQuad(const ByteTable& table, const Codes& codes) {
    const auto two_bytes = [&](int part, int first) {
      const auto word = [&](int i) {
        const int lane = part * kPartLanes + i;
        return table[Byte(codes, lane, first)][kQuad] |
               uint32_t{table[Byte(codes, lane, first + 2)][kQuad]} << 16;
      };
      return std::bit_cast<Shorts>(Words{word(0), word(1), word(2), word(3)});
    };
    Quad quad;
    for (int i = 0; i < kParts; ++i) {
      quad.even[i] = two_bytes(i, 0);
      quad.odd[i] = two_bytes(i, 1);
    }
    return quad;
  }
  static QuadSum StartSum(int32_t start) {
    QuadSum sum;
    for (Integers& part : sum.part) part = Integers{} + start;
    return sum;
  }
  // The sum of two products of a byte up to 128 and an activation fits 16 bits.
  static QuadSum DotQuad(QuadSum sum, const Quad& w, const int8_t* a) {
    const Shorts even = SplatTwo(a[0], a[2]), odd = SplatTwo(a[1], a[3]);
    for (int i = 0; i < kParts; ++i) {
      const auto products = std::bit_cast<Integers>(w.even[i] * even + w.odd[i] * odd);
      sum.part[i] += (products >> 16) + (products << 16 >> 16);
    }
    return sum;
  }
  static Vec FinishSum(const QuadSum& sum) {
    return Map([&](int i) { return __builtin_convertvector(sum.part[i], Floats); });
  }

 private:
  static constexpr std::array<float, 256> kE4M3Values = [] {
    std::array<float, 256> values{};
    for (size_t code = 0; code < values.size(); ++code) {
      values[code] = E4M3{static_cast<uint8_t>(code)}.ToFloat();
    }
    return values;
  }();

  template <class PartFunction>
  static Vec Map(PartFunction f) {
    Vec v;
    for (int i = 0; i < kParts; ++i) v.part[i] = f(i);
    return v;
  }
  template <class LaneFunction>
  static Vec MapLanes(LaneFunction f) {
    return Map([&](int part) {
      const int i = part * kPartLanes;
      return Floats{f(i), f(i + 1), f(i + 2), f(i + 3)};
    });
  }
  static Floats Splat(float x) { return Floats{x, x, x, x}; }
  static Shorts SplatTwo(int16_t low, int16_t high) {
    return Shorts{low, high, low, high, low, high, low, high};
  }
  static Floats PowerOfTwo(Integers n) { return std::bit_cast<Floats>((n + 127) << 23); }

  static size_t Byte(const Codes& codes, int lane, int byte) {
    static_assert(std::endian::native == std::endian::little);
    return std::to_integer<size_t>(codes.bytes[4 * lane + byte]);
  }
  template <class Value>
  static constexpr CodeTable<Value> MakeCodeTable(const std::array<Value, 16>& values) {
    CodeTable<Value> table{};
    for (size_t byte = 0; byte < table.size(); ++byte) {
      table[byte] = {values[byte & 15], values[byte >> 4]};
    }
    return table;
  }
};

}  // namespace cpumoe
