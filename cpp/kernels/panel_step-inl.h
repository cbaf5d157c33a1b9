// What both panel kernels do with a pair of a panel (panel_kernels-inl.h, gemm-inl.h), and the
// helpers that all kernels use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "kernels/isa.h"

namespace cpumoe {

inline constexpr int64_t kCacheLine{AlignedBuffer::kCacheLine};

// Must be inlined. GCC 12 assumes that a function that only prefetches has no effect, and drops
// calls of it.
inline __attribute__((always_inline)) void Prefetch(const std::byte* at) { __builtin_prefetch(at); }
inline __attribute__((always_inline)) void PrefetchL2(const std::byte* at) {
  __builtin_prefetch(at, /*rw=*/0, /*locality=*/2);
}

// Makes the compiler keep C in memory between groups. In registers C would displace the group's
// sums, which compilers would then spill instead.
inline __attribute__((always_inline)) void KeepInMemory() { asm volatile("" ::: "memory"); }

// One pair (k, k+1) of a panel. Every kernel adds a token's products in the order of pairs.
template <class Isa>
struct PanelStep {
  using Activation = typename Isa::Activation;
  using Pair = typename Isa::Pair;
  using Vec = typename Isa::Vec;

  // Fetches into L2 the data `to_next` bytes after the activations of pair p.
  template <int kTokens>
  static inline __attribute__((always_inline)) void PrefetchPair(const Activation* a, int64_t p,
                                                                 int64_t to_next) {
    PrefetchL2(reinterpret_cast<const std::byte*>(a + p * 2 * kTokens) + to_next);
  }

  // Adds the products of pair p of the panel, [pair][tile], with the pair's activations.
  template <int kTokens, int kTiles>
  static inline __attribute__((always_inline)) void AddPair(const Pair* panel, const Activation* a,
                                                            int64_t p,
                                                            Vec (&sum)[kTiles][kTokens]) {
    panel += p * kTiles;
    a += p * kTokens * 2;
    if constexpr (Isa::kSplitsPairs) {
      AddHalf<kTokens, kTiles>([panel](int r) { return panel[r].even; }, a, sum);
      KeepInMemory();
      AddHalf<kTokens, kTiles>([panel](int r) { return panel[r].odd; }, a + 1, sum);
    } else {
      Pair w[kTiles];
      for (int r = 0; r < kTiles; ++r) w[r] = panel[r];
      for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < kTiles; ++r) sum[r][t] = Isa::Dot(sum[r][t], w[r], a + t * 2);
      }
    }
  }

  // Adds the products of the even or the odd weights of a pair. half(tile) returns these weights.
  // `a` is the activation of the first token.
  template <int kTokens, int kTiles, class Half>
  static inline __attribute__((always_inline)) void AddHalf(Half half, const Activation* a,
                                                            Vec (&sum)[kTiles][kTokens]) {
    Vec w[kTiles];
    for (int r = 0; r < kTiles; ++r) w[r] = half(r);
    for (int t = 0; t < kTokens; ++t) {
      const Vec x = Isa::Broadcast(a[t * 2]);
      for (int r = 0; r < kTiles; ++r) sum[r][t] = Isa::Fma(w[r], x, sum[r][t]);
    }
  }
};

}  // namespace cpumoe
