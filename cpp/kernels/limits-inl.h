// The best that a core can do, with which kernels are compared: an ISA's multiply-adds with nothing
// else around them, and a streaming read. The loops are written once, in the vocabulary of isa.h.
//
//   FloatDots  repeats  sum[i] = sum[i] * x + y             for fp32 activations
//                       sum[i] = Dot(sum[i], w, a)          for others: the ISA's dot product
//          It has as many chains i as the panel kernel has sums, so that both hide equal latencies.
//          Sums and factors stay in registers; the loop neither loads nor stores. A panel unit has
//          a loop of its own.
//   QuadDots  is the loop of the byte paths. If product and addition are two instructions, a chain
//          loads its factor, because the compiler would move an invariant product out of the loop.
//   Read   sum[s] += data[s][i]  for a few streams s. Prefetchers stop at the end of a 4 KiB page,
//          and other streams go on while one starts again (13 % more from an Ice Lake's memory).
//   Copy   reads and writes a few streams, a few lines of each in turn, and writes past the caches.
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
  static constexpr int64_t kCopyRun = 4 * kVectorBytes;
  static constexpr int64_t kCopyBytes = kStreams * kCopyRun;
  static constexpr int64_t kRoundDots = int64_t{kChains} * kTileRows * (kFp32 ? 1 : 2);

  // Multiplies as the floating point path does, and returns the multiply-accumulates done.
  static int64_t FloatDots(int64_t rounds) {
    if constexpr (HasPanelUnit<Isa>) {
      return Isa::PanelUnit::Dots(rounds);
    } else {
      return VectorDots(rounds);
    }
  }

  // Multiplies as the byte paths do, and returns the multiply-accumulates of bytes done.
  static int64_t QuadDots(int64_t rounds) {
    // Enough chains for two units with five cycles of latency. With more chains, GCC 12 spills.
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

  // Reads `count` floats as kStreams streams. `count` must be a multiple of kReadFloats, and no
  // float may be subnormal.
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

  // Copies `bytes` bytes, a multiple of kCopyBytes, to an address that is a multiple of
  // kVectorBytes. The copy is visible to other threads and devices when the function returns.
  static void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
    const int64_t length = bytes / kStreams;
    for (int64_t run = 0; run < length; run += kCopyRun) {
      for (int64_t stream = run; stream < bytes; stream += length) {
        Unroll<kCopyRun / kVectorBytes>([&](auto i) {
          Isa::Stream(to + stream + i * kVectorBytes, from + stream + i * kVectorBytes);
        });
      }
    }
    Isa::FinishStreams();
  }

 private:
  static int64_t VectorDots(int64_t rounds) {
    // The start values differ and are unknown to the compiler. Otherwise it would compute one chain
    // for all of them.
    alignas(64) float memory[kChains * kTileRows];
    for (int i = 0; i < kChains * kTileRows; ++i) memory[i] = static_cast<float>(i);
    Escape(memory);
    Vec sum[kChains];
    Unroll<kChains>([&](auto i) { sum[i] = Isa::Load(memory + i * kTileRows); });
    if constexpr (kFp32) {
      // The sum is a factor, because the compiler could move a product of loop invariants out of
      // the loop. The sum converges to 2.
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

  // Makes the compiler assume that code which it cannot see reads and writes the array.
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
