// Plain C++ for any CPU: loops over sixteen lanes that compilers vectorise to what they may assume.
//
// This is the reference for the other ISAs' semantics, and the fallback: right, not fast.
#pragma once

#include <array>
#include <bit>
#include <cmath>
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
  static constexpr int kCrossover = kFusedTokens;
  static constexpr int kPanelTokens = 2;
  static constexpr int kPanelPairs = 256;
  static constexpr int kPlaneTokens = 0;
  static constexpr int kPrecisePlaneTokens = 0;
  static constexpr int kQuadTokens = 2;
  static constexpr int32_t kQuadSumLimit = std::numeric_limits<int32_t>::max();
  static constexpr bool kQuadDotIsOneInstruction = false;

  struct Vec {
    float lane[kTileRows];
  };
  struct Pair {
    Vec even, odd;
  };
  struct Codes {
    uint32_t lane[kTileRows];
  };
  using Table16 = std::array<float, 16>;
  using Fold = Vec;
  struct Quad {
    uint8_t byte[kTileRows][kQuadDepth];
  };
  struct QuadSum {
    int32_t lane[kTileRows];
  };
  using ByteTable = std::array<uint8_t, 16>;

  static Vec Zero() { return Broadcast(0.0f); }
  static Vec Load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
  static void StoreActivations(Activation* p, Vec v) { Store(p, v); }
  static Vec Broadcast(float x) {
    return Map([x](int) { return x; });
  }
  static Vec Add(Vec a, Vec b) {
    return Map([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec Mul(Vec a, Vec b) {
    return Map([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec Div(Vec a, Vec b) {
    return Map([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Vec Fma(Vec a, Vec b, Vec c) {
    return Map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Vec Min(Vec a, Vec b) {
    return Map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec Max(Vec a, Vec b) {
    return Map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec Round(Vec v) {
    return Map([&](int i) { return std::nearbyint(v.lane[i]); });
  }
  static Vec Ldexp(Vec v, Vec n) {
    return Map([&](int i) {
      // In two factors, so that results beyond either end of the exponent range come out right. NaN
      // has no integer; the product keeps it.
      const int whole = std::isnan(n.lane[i]) ? 0 : static_cast<int>(n.lane[i]);
      const int half = whole >> 1;
      return v.lane[i] * PowerOfTwo(half) * PowerOfTwo(whole - half);
    });
  }

  template <class Scale>
  static Vec LoadScales(const Scale* p) {
    return Map([p](int i) { return p[i].ToFloat(); });
  }

  static Codes LoadCodes(const std::byte* p) {
    Codes codes;
    std::memcpy(&codes, p, sizeof(codes));
    return codes;
  }
  static Table16 MakeTable(const std::array<float, 16>& values) { return values; }
  template <int kPair>
  static Pair Lookup(const Table16& table, const Codes& codes) {
    constexpr int kShift = PairShift<4>(kPair);
    return {Map([&](int i) { return table[(codes.lane[i] >> kShift) & 15]; }),
            Map([&](int i) { return table[(codes.lane[i] >> (16 + kShift)) & 15]; })};
  }

  static Vec Dot(Vec sum, Pair w, const Activation* a) {
    return Fma(w.odd, Broadcast(a[1]), Fma(w.even, Broadcast(a[0]), sum));
  }

  template <class Scale>
  static Fold LoadFold(const Scale* p) {
    return LoadScales(p);
  }
  static Pair Multiply(Pair w, Fold f) { return {Mul(w.even, f), Mul(w.odd, f)}; }

  static ByteTable MakeByteTable(const std::array<uint8_t, 16>& bytes) { return bytes; }
  template <int kQuad>
  static Quad LookupQuad(const ByteTable& table, const Codes& codes) {
    Quad quad;
    for (int i = 0; i < kTileRows; ++i) {
      for (int k = 0; k < kQuadDepth; ++k) {
        quad.byte[i][k] = table[(codes.lane[i] >> (8 * k + 4 * kQuad)) & 15];
      }
    }
    return quad;
  }
  static QuadSum StartSum(int32_t start) {
    QuadSum sum;
    for (int32_t& lane : sum.lane) lane = start;
    return sum;
  }
  static QuadSum DotQuad(QuadSum sum, const Quad& w, const int8_t* a) {
    for (int i = 0; i < kTileRows; ++i) {
      for (int k = 0; k < kQuadDepth; ++k) sum.lane[i] += w.byte[i][k] * a[k];
    }
    return sum;
  }
  static Vec FinishSum(const QuadSum& sum) {
    return Map([&](int i) { return static_cast<float>(sum.lane[i]); });
  }

 private:
  template <class LaneFunction>
  static Vec Map(LaneFunction f) {
    Vec v;
    for (int i = 0; i < kTileRows; ++i) v.lane[i] = f(i);
    return v;
  }
  static float PowerOfTwo(int n) { return std::bit_cast<float>((n + 127) << 23); }
};

}  // namespace cpumoe
