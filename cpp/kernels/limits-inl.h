// What a core can do at best, to compare the kernels with: an ISA's multiply-adds with nothing else
// around them, and a streaming read. Written once in an ISA's vocabulary.
//
//   Dots   for ever  sum[i] = sum[i] * x + y                 fp32 activations
//                    sum[i] = Dot(sum[i], w, a)              others: the ISA's dot product
//          with as many chains i as the panel kernel has sums, so that both hide the same latency;
//          sums and factors stay in registers, the loop neither loads nor stores. A panel unit has
//          a loop of its own.
//   QuadDots  the same for the int8 path; where product and addition are two instructions, a chain
//          loads its factor, because an invariant product would leave the loop. Where the default
//          path is the digit path for any number of tokens, Dots are these, over a group's digits.
//   Read   sum[s] += data[s][i]  for a few streams s: prefetchers stop at the end of a 4 KiB page,
//          and other streams go on while one starts afresh (13 % more from an Ice Lake's memory).
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "kernels/digit_gemm-inl.h"
#include "kernels/gemm-inl.h"
#include "kernels/isa.h"
#include "kernels/tile.h"

namespace cpumoe {

template <ByteIsa Isa>
struct Limits {
  using Vec = typename Isa::Vec;
  using Activation = typename Isa::Activation;

  static constexpr bool kFp32 = std::same_as<Activation, float>;
  static constexpr int kChains = Isa::kTiles * Isa::kPanelTokens;
  static constexpr int kStreams = 4;
  static constexpr int64_t kReadFloats = kStreams * kTileRows;
  static constexpr int64_t kRoundDots = int64_t{kChains} * kTileRows * (kFp32 ? 1 : 2);

  // Returns the multiply-accumulates done.
  static int64_t Dots(int64_t rounds) {
    if constexpr (HasPanelUnit<Isa>) {
      return Isa::PanelUnit::Dots(rounds);
    } else if constexpr (Isa::kDigitTokens == kAnyTokens) {
      return QuadDots(rounds) / kFewDigits;
    } else {
      return VectorDots(rounds);
    }
  }

  // The int8 path's: with many tokens a panel unit's are its products, too (moe/mixed_path-inl.h).
  static int64_t Int8Dots(int64_t rounds) {
    if constexpr (HasPanelUnit<Isa>) {
      return Isa::PanelUnit::Dots(rounds);
    } else {
      return QuadDots(rounds);
    }
  }

  static int64_t QuadDots(int64_t rounds) {
    // Enough for two units of five cycles' latency; with more, GCC 12 spills.
    constexpr int kQuadChains = std::min(Isa::kTiles * Isa::kQuadTokens, 12);
    int32_t start[kQuadChains] = {};
    int8_t a[kQuadChains * kQuadDepth] = {};
    std::byte codes[kVectorBytes] = {};
    Escape(start);
    Escape(a);
    Escape(codes);
    const auto w = Isa::template LookupQuad<0>(Isa::MakeByteTable({}), Isa::LoadCodes(codes));
    typename Isa::QuadSum sum[kQuadChains];
    Unroll<kQuadChains>([&](auto i) { sum[i] = Isa::StartSum(start[i]); });
    for (int64_t r = 0; r < rounds; ++r) {
      if constexpr (!Isa::kQuadDotIsOneInstruction) Escape(a);
      Unroll<kQuadChains>([&](auto i) {
        sum[i] = Isa::DotQuad(sum[i], w, Isa::kQuadDotIsOneInstruction ? a : a + i * kQuadDepth);
      });
    }
    alignas(64) float memory[kQuadChains * kTileRows];
    Unroll<kQuadChains>(
        [&](auto i) { Isa::Store(memory + i * kTileRows, Isa::FinishSum(sum[i])); });
    Escape(memory);
    return rounds * kQuadChains * kTileRows * kQuadDepth;
  }

  // Reads `count` floats, a multiple of kReadFloats, none of them subnormal, as kStreams streams.
  static void Read(const float* data, int64_t count) {
    Vec sum[kStreams];
    Unroll<kStreams>([&](auto s) { sum[s] = Isa::Zero(); });
    const int64_t length = count / kStreams;
    for (int64_t i = 0; i < length; i += kTileRows) {
      Unroll<kStreams>(
          [&](auto s) { sum[s] = Isa::Add(sum[s], Isa::Load(data + s * length + i)); });
    }
    alignas(64) float result[kStreams * kTileRows];
    Unroll<kStreams>([&](auto s) { Isa::Store(result + s * kTileRows, sum[s]); });
    Escape(result);
  }

 private:
  static int64_t VectorDots(int64_t rounds) {
    // Different and unknown to the compiler, or it would compute one chain for all of them.
    alignas(64) float memory[kChains * kTileRows];
    for (int i = 0; i < kChains * kTileRows; ++i) memory[i] = static_cast<float>(i);
    Escape(memory);
    Vec sum[kChains];
    Unroll<kChains>([&](auto i) { sum[i] = Isa::Load(memory + i * kTileRows); });
    if constexpr (kFp32) {
      // The sum is a factor: a product of loop invariants could leave the loop. It converges to 2.
      float factors[2] = {0.5f, 1.0f};
      Escape(factors);
      const Vec x = Isa::Broadcast(factors[0]), y = Isa::Broadcast(factors[1]);
      for (int64_t r = 0; r < rounds; ++r) {
        Unroll<kChains>([&](auto i) { sum[i] = Isa::Fma(sum[i], x, y); });
      }
    } else {
      const typename Isa::Pair w = SomePair();
      Activation a[2] = {Isa::ToActivation(1.0f), Isa::ToActivation(1.0f)};
      Escape(a);
      for (int64_t r = 0; r < rounds; ++r) {
        Unroll<kChains>([&](auto i) { sum[i] = Isa::Dot(sum[i], w, a); });
      }
    }
    Unroll<kChains>([&](auto i) { Isa::Store(memory + i * kTileRows, sum[i]); });
    Escape(memory);
    return rounds * kRoundDots;
  }

  // Tells the compiler that the array is read and written where it cannot see.
  template <class T, size_t kSize>
  static void Escape(T (&array)[kSize]) {
    asm volatile("" : : "r"(array) : "memory");
  }

  static typename Isa::Pair SomePair() {
    std::array<float, 16> values;
    values.fill(1.0f);
    std::byte codes[kVectorBytes] = {};
    Escape(codes);
    return Isa::template Lookup<0>(Isa::MakeTable(values), Isa::LoadCodes(codes));
  }
};

}  // namespace cpumoe
