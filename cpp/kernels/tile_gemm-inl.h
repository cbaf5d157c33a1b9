// The driver of the floating point path. It multiplies all tokens of one expert with a few pairs of
// tiles, by the fused or the panel kernel (gemm-inl.h), or by the ISA's panel unit.
//
// The activations of many tokens exceed the L2 cache (96 tokens of 4096 fp32: 1.5 MB). A kernel
// reads four bytes of them per cycle, more than a core gets from L3. Therefore the pairs of tiles
// take turns at each KC columns, whose activations then stay in L2.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <utility>

#include "kernels/gemm-inl.h"
#include "kernels/panel_kernels.h"
#include "kernels/product.h"
#include "kernels/token_blocks.h"
#include "kernels/unit_gemm-inl.h"

namespace cpumoe {

template <class Isa, class Codec>
class TileGemm {
  using Kernels = Gemm<Isa, Codec>;
  using Format = typename Codec::Format;
  using Geometry = typename Kernels::Geometry;
  using Pair = typename Isa::Pair;
  using Activation = typename Isa::Activation;

 public:
  // MR of the fused kernel.
  static constexpr int kFusedTokens =
      Kernels::kScaled ? Isa::kFusedTokens : Isa::kUnscaledFusedTokens;
  // Most tokens of an expert that the fused kernel can multiply. Blocks have up to kPanelTokens
  // tokens, and it may take several if it takes as many tokens.
  static constexpr int kMostFewTokens =
      kFusedTokens == Isa::kPanelTokens ? kAnyTokens : kFusedTokens;

  static_assert(Isa::kTiles <= TilePair::kCount && kFusedTokens <= Isa::kPanelTokens);
  static constexpr int64_t kPanelBytes =
      int64_t{Isa::kTiles} * Isa::kPanelPairs * static_cast<int64_t>(sizeof(Pair));

  // Returns the kernel for an expert's tokens: fused for up to `few_token_limit` tokens, panel for
  // more.
  static StagedForm FormFor(int64_t tokens, int few_token_limit) {
    return tokens <= std::min(few_token_limit, kMostFewTokens) ? StagedForm::kFused
                                                               : StagedForm::kPanel;
  }

  // How many tiles of a pair are read side by side.
  static int TilesAtOnce(StagedForm form, const TokenBlocks& blocks) {
    if (form == StagedForm::kFused) return FusedTiles(blocks.Size(0));
    if constexpr (HasPanelUnit<Isa>) {
      return UnitGemm<Isa, Codec>::TilesAtOnce(blocks);
    } else {
      return kTiles;
    }
  }

  // c = A * tiles^T for the pairs `w`, which belong to one matrix or to two matrices of one expert.
  // A is staged for `form`. `panel` is scratch memory of kPanelBytes.
  static void Run(const Codec& codec, std::span<const TilePair> w, StagedForm form,
                  const Activation* a, Pair* panel, const Product& c) {
    if (form == StagedForm::kFused) {
      RunFused(codec, w, a, c);
      return;
    }
    if constexpr (!Kernels::kScaled || kAlwaysFolds<Codec, Isa>) {
      RunMany<true>(codec, w, a, panel, c);
    } else {
      if constexpr (Kernels::kFolding) {
        if (w[0].fold) {
          RunMany<true>(codec, w, a, panel, c);
          return;
        }
      }
      RunMany<false>(codec, w, a, panel, c);
    }
  }

 private:
  using FusedKernel = void (*)(Codec, const TileView*, const Activation*, int64_t, float*);
  using ScaledPanelKernel = void (*)(Codec, const TileView*, int64_t, int64_t, const Pair*,
                                     const Activation*, int64_t, float*);

  static constexpr int kTiles = Isa::kTiles;

  // How many tiles of a pair the fused kernel reads side by side. Memory delivers two streams
  // faster than one, and twice as many sums wait less for each other. Scales apply to few sums at a
  // time anyway (Gemm::Fused), unless they are those of several groups.
  static constexpr int FusedTiles(int tokens) {
    const bool sums_last = !Kernels::kScaled || Kernels::kRun > 1;
    return sums_last && tokens * TilePair::kCount < kFusedTokens * kTiles ? TilePair::kCount
                                                                          : kTiles;
  }

  // Tables of kernels by number of tokens. The kernel for n tokens is entry [n - 1].
  template <int... n>
  static constexpr auto FusedTable(std::integer_sequence<int, n...>) {
    return std::array<FusedKernel, sizeof...(n)>{
        &Kernels::template Fused<n + 1, FusedTiles(n + 1)>...};
  }
  template <bool kFetches, int... n>
  static constexpr auto ScaledPanelTable(std::integer_sequence<int, n...>) {
    using Panels = PanelKernels<Isa>;
    return std::array<ScaledPanelKernel, sizeof...(n)>{
        &Kernels::template ScaledPanel<n + 1, kTiles, Panels::FetchesFor(kFetches, n + 1)>...};
  }
  static constexpr std::array<FusedKernel, kFusedTokens> kFused =
      FusedTable(std::make_integer_sequence<int, kFusedTokens>{});

  // Groups [begin, end) of kTiles tiles that have `groups` groups, and the panel that they are
  // decoded to.
  struct Span {
    const TileView* tiles;
    Pair* panel;
    int64_t begin, end, groups;
  };

  // Later blocks find the tiles in L2.
  static void RunFused(const Codec& codec, std::span<const TilePair> w, const Activation* a,
                       const Product& c) {
    static_assert(kMostFewTokens == kFusedTokens || FusedTiles(kFusedTokens / 2) == kTiles,
                  "all of several blocks must read as many tiles at once");
    const TokenBlocks& blocks = c.blocks();
    const int at_once = FusedTiles(blocks.Size(0));
    for (int64_t pair = 0; pair < std::ssize(w); ++pair) {
      const int64_t groups = w[pair].groups;
      for (int first = 0; first < TilePair::kCount; first += at_once) {
        for (int64_t b = 0; b < blocks.count(); ++b) {
          kFused[blocks.Size(b) - 1](codec, &w[pair].tiles[first],
                                     a + blocks.Begin(b) * groups * kGroupSize, groups,
                                     c.At(pair, b, first));
        }
      }
    }
  }

  template <bool kFold>
  static void RunMany(const Codec& codec, std::span<const TilePair> w, const Activation* a,
                      Pair* panel, const Product& c) {
    if constexpr (HasPanelUnit<Isa>) {
      UnitGemm<Isa, Codec>::template Run<kFold>(codec, w, a, panel, c);
    } else {
      RunPanels<kFold>(codec, w, a, panel, c);
    }
  }

  // Multiplies by the panel kernel. Weights are fetched into L2 from memory one turn ahead. The
  // next round's activations are fetched from L3 in the last turns of a round. Both are fetched
  // little by little, because bursts would take the fill buffers that kernels need. With a single
  // block most of the work is decoding, which streams the weights itself.
  template <bool kFold>
  static void RunPanels(const Codec& codec, std::span<const TilePair> w, const Activation* a,
                        Pair* panel, const Product& c) {
    constexpr int64_t kPairTurns = TilePair::kCount / kTiles;
    const TokenBlocks& blocks = c.blocks();
    const int64_t groups = w[0].groups;
    const int64_t round = std::ssize(w) * kPairTurns;  // turns at equal columns
    const int64_t turns = CeilDiv(groups, int64_t{Kernels::kPanelGroups}) * round;
    const int64_t block_bytes = RoundUp(CeilDiv(kCodeBytes, blocks.count()), kCacheLine);
    const auto span_of = [&](int64_t turn) {
      const int64_t begin = turn / round * Kernels::kPanelGroups;
      const int64_t end = std::min<int64_t>(begin + Kernels::kPanelGroups, groups);
      const TilePair& pair = w[turn % round / kPairTurns];
      return Span{&pair.tiles[turn % kPairTurns * kTiles], panel, begin, end, groups};
    };
    c.Clear(std::ssize(w));
    for (int64_t turn = 0; turn < turns; ++turn) {
      const Span span = span_of(turn);
      const Span next = span_of(std::min(turn + 1, turns - 1));
      const bool streams = blocks.count() == 1;
      Kernels::template DecodePanel<kTiles, kFold>(codec, span.tiles, span.begin, span.end, groups,
                                                   streams, panel);
      if (!streams) FetchScales(next);
      const int first = static_cast<int>(turn % kPairTurns) * kTiles;
      const int64_t pair = turn % round / kPairTurns;
      for (int64_t b = 0; b < blocks.count(); ++b) {
        if (!streams) FetchCodes(next, b * block_bytes, block_bytes);
        const Block block = BlockOf(span, a, c, pair, b, first);
        const int64_t to_next = ToNextColumns(span, block, round - 1 - turn % round);
        if (to_next == 0) {
          MultiplyByVectors<kFold, false>(codec, span, block, to_next);
        } else {
          MultiplyByVectors<kFold, true>(codec, span, block, to_next);
        }
      }
    }
  }

  static constexpr int64_t kCodeBytes =  // of one tile's columns in a panel
      int64_t{Kernels::kPanelGroups} * Geometry::kGroupBytes;

  static inline __attribute__((always_inline)) void FetchScales(const Span& s) {
    constexpr int64_t kScaleBytes = Kernels::Tiles::kScaleBytes;
    for (int r = 0; r < kTiles; ++r) {
      const int64_t begin = s.begin / Kernels::kRun * kScaleBytes;
      const int64_t end = CeilDiv(s.end, int64_t{Kernels::kRun}) * kScaleBytes;
      for (int64_t at = begin; at < end; at += kCacheLine) {
        PrefetchL2(s.tiles[r].scales + at);
      }
    }
  }
  // Fetches bytes [begin, begin + bytes) of each tile's codes.
  static inline __attribute__((always_inline)) void FetchCodes(const Span& s, int64_t begin,
                                                               int64_t bytes) {
    const int64_t end = std::min(begin + bytes, (s.end - s.begin) * Geometry::kGroupBytes);
    for (int64_t at = begin; at < end; at += kCacheLine) {
      for (int r = 0; r < kTiles; ++r) {
        PrefetchL2(s.tiles[r].codes + s.begin * Geometry::kGroupBytes + at);
      }
    }
  }

  // A block of tokens: its activations from the first column of a span on, and its product with the
  // span's tiles.
  struct Block {
    int tokens;
    const Activation* a;
    float* c;  // [tile][token][16]
  };

  // Block b, whose product with the span's tiles begins with tile `first` of pair `pair`.
  static Block BlockOf(const Span& s, const Activation* a, const Product& c, int64_t pair,
                       int64_t b, int first) {
    const int tokens = c.blocks().Size(b);
    const int64_t column = c.blocks().Begin(b) * s.groups + s.begin * tokens;
    return {tokens, a + column * kGroupSize, c.At(pair, b, first)};
  }

  // Returns the bytes from a block's columns of this span to its columns of the next round, or 0 if
  // this turn fetches nothing. After the last round come the first columns again, because gate and
  // up multiply the same tokens in the next task, too.
  //
  // Only the last turns of a round fetch, so that nothing is displaced that earlier turns still
  // use. The last turn fetches one cache line of each pair of columns of all tokens. The turn
  // before it fetches the second line, if the pair of columns is that long.
  static int64_t ToNextColumns(const Span& s, const Block& block, int64_t turns_left) {
    const int64_t pair_bytes = block.tokens * 2 * static_cast<int64_t>(sizeof(Activation));
    const int64_t line = turns_left * kCacheLine;
    const bool all_at_hand = s.begin == 0 && s.end == s.groups;
    if (all_at_hand || line >= pair_bytes) return 0;
    const int64_t groups = s.end < s.groups ? s.end - s.begin : -s.begin;
    return groups * Geometry::kGroupPairs * pair_bytes + line;
  }

  template <bool kFold, bool kFetches>
  static void MultiplyByVectors(const Codec& codec, const Span& s, const Block& block,
                                int64_t to_next) {
    if constexpr (kFold) {
      const auto& kernels = kFetches ? PanelKernels<Isa>::kFetching : PanelKernels<Isa>::kPlain;
      kernels[block.tokens - 1](s.panel, block.a, (s.end - s.begin) * Geometry::kGroupPairs,
                                to_next, block.c);
    } else {
      static constexpr auto kScaledPanel =
          ScaledPanelTable<kFetches>(std::make_integer_sequence<int, Isa::kPanelTokens>{});
      kScaledPanel[block.tokens - 1](codec, s.tiles, s.begin, s.end, s.panel, block.a, to_next,
                                     block.c);
    }
  }
};

}  // namespace cpumoe
