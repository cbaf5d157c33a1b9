// One round of the forward pass: a bounded number of tokens through all of a layer's experts.
//
//   route     group (token, slot) pairs by expert (routing.h), choose the kernels of each expert
//   stage     gather each expert's tokens into blocks, converted for the multiplier (path.h)
//   gate, up  task = a few tiles of gate and of up of one expert, all its tokens; activation;
//             stage h
//   down      task = a few tiles of output rows, all experts in ascending order; weighted sum;
//             convert to the output's dtype, or add onto the output
//
// A tile's result depends only on the tile's own inputs, and sums run in a fixed order. Therefore
// outputs are bit-identical for any number of threads, of tiles per task, and of nodes among which
// the tiles are divided. All tasks of a phase read equally many weight bytes, except the last task
// of a node, for an expert (gate, up) or for the outputs (down).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/bits.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"
#include "moe/activation-inl.h"
#include "moe/forward_pass.h"
#include "moe/packed_experts.h"
#include "moe/weighted_sum-inl.h"
#include "packing/tile_shares.h"
#include "paths/compute_path.h"
#include "staging/stage-inl.h"
#include "threading/thread_pool.h"

namespace cpumoe {

template <class Isa>
class ForwardPass {
  using Vec = typename Isa::Vec;
  using Expert = Workspace::Expert;

 public:
  ForwardPass(const PackedExperts& weights, const ComputePath& path, const ForwardArgs& args,
              ThreadPool& pool, Workspace& workspace)
      : weights_(weights),
        path_(path),
        args_(args),
        pool_(pool),
        workspace_(workspace),
        routing_(workspace.routing()),
        experts_(workspace.experts()),
        hidden_{.columns = weights.config().hidden_size},
        intermediate_{.columns = weights.config().intermediate_size} {}

  // Computes output rows [begin, end).
  void Run(int64_t begin, int64_t end) {
    begin_ = begin;
    tokens_ = end - begin;
    routing_.Build(args_.routing, begin, end, weights_.has_weights(), weights_.config().copy_of);
    ListExperts();
    shared_ = tokens_ == 1 && routing_.tokens().size() == experts_.size();
    const int64_t experts = std::ssize(experts_);
    const int64_t features = CeilDiv(GateTiles(), FeatureUnit());
    const int64_t outputs = CeilDiv(DownTiles(), int64_t{TilePair::kCount});
    features_per_task_ = PerTask(experts * features, 32, 4);
    outputs_per_task_ = PerTask(outputs, 8, kMostPerTask);
    Reserve();
    if (experts > 0) Stage();
    ForEachPiece(pool_, weights_.shares(Projection::kGate), features_per_task_ * FeatureUnit(),
                 experts, [&](int64_t expert, TileRange tiles, int thread) {
                   GateUp(experts_[expert], tiles, thread);
                 });
    ForEachPiece(pool_, weights_.shares(Projection::kDown), outputs_per_task_ * TilePair::kCount, 1,
                 [&](int64_t, TileRange tiles, int thread) { Down(tiles, thread); });
    if (args_.counters != nullptr) Count(*args_.counters);
  }

 private:
  // Staged activations [pairs, columns] in token blocks. A pair has room for any staged form, and
  // the blocks of an expert follow one another.
  struct Staged {
    int64_t columns;
    int64_t bytes_per_pair = 0;
    std::byte* blocks = nullptr;
  };

  static constexpr int64_t kMostPerTask = 16;
  static constexpr int kMostFeatureTiles = kGroupSize / kTileRows;  // of a ComputePath

  // Lists the experts of the round, and decides once how each of them is multiplied.
  void ListExperts() {
    const int limit = path_.FewTokenLimit(weights_.config().kernels());
    experts_.clear();
    most_tokens_ = 0;
    for (const Routing::Expert& expert : routing_.experts()) {
      experts_.push_back({.id = expert.id,
                          .begin = expert.begin,
                          .blocks = TokenBlocks(expert.count, path_.block_tokens),
                          .form = path_.form_for(args_.input_dtype, expert.count, limit),
                          .fold = path_.folds_exactly(weights_.scales(expert.id))});
      most_tokens_ = std::max(most_tokens_, expert.count);
    }
  }

  // Returns how many of `count` pieces of work one task takes. The result grows as long as enough
  // tasks remain: tasks_of_few per thread for few tokens, 4 per thread for many tokens.
  //
  // With few tokens, weights stream from one piece of a task to the next without a gap. With many
  // tokens, the pieces of a task share the activations that a core fetches. Sharing pays the more,
  // the farther away the activations are.
  int64_t PerTask(int64_t count, int64_t tasks_of_few, int64_t most_of_many) const {
    const bool few = most_tokens_ <= path_.StreamedTokens();
    const int64_t tasks = pool_.num_threads() * (few ? tasks_of_few : 4);
    return PiecesPerTask(count, tasks, few ? 8 : most_of_many);
  }

  void Reserve() {
    const auto pairs = static_cast<int64_t>(routing_.tokens().size());
    hidden_.bytes_per_pair = MostStagedBytes(hidden_.columns);
    hidden_.blocks = workspace_.Activations(pairs * hidden_.bytes_per_pair);
    intermediate_.bytes_per_pair = MostStagedBytes(intermediate_.columns);
    intermediate_.blocks = workspace_.Intermediate(pairs * intermediate_.bytes_per_pair);
    const int64_t pairs_of_features = gated() ? FeatureUnit() : FeatureUnit() / TilePair::kCount;
    const int64_t products = std::max(pairs_of_features * features_per_task_, outputs_per_task_);
    product_offset_ = path_.panel_bytes;
    sums_offset_ = product_offset_ + ProductBytes(products, most_tokens_);
    workspace_.ReserveScratch(pool_.num_threads(),
                              sums_offset_ + ProductBytes(outputs_per_task_, tokens_));
  }

  void Count(LayerCounters& counters) const {
    routing_.CountTokens(counters.expert_tokens);
    counters.bytes_read.fetch_add(std::ssize(experts_) * weights_.copy_bytes(),
                                  std::memory_order_relaxed);
  }

  void Stage() {
    if (shared_) {
      // Runs as a task of the pool, because the caller's floating-point environment may differ from
      // the pool's.
      pool_.For(1, [&](int64_t, int) {
        const int32_t token = 0;
        path_.stage_rows(experts_[0].form, args_.input_dtype, Row(0), 0, &token, 1, HiddenSize(),
                         hidden_.blocks);
      });
      return;
    }
    std::vector<Workspace::Block>& blocks = workspace_.blocks();
    blocks.clear();
    for (const Expert& expert : experts_) {
      for (int64_t b = 0; b < expert.blocks.count(); ++b) {
        blocks.push_back({expert.begin + expert.blocks.Begin(b), expert.blocks.Size(b), expert.form,
                          BlockAt(hidden_, expert, b)});
      }
    }
    pool_.For(static_cast<int64_t>(blocks.size()), [&](int64_t task, int) {
      const Workspace::Block& block = blocks[task];
      path_.stage_rows(block.form, args_.input_dtype, Row(0), args_.hidden_stride,
                       &routing_.tokens()[block.pair], block.tokens, HiddenSize(), block.staged);
    });
  }

  // A task of an expert's gate and up: up to features_per_task_ * FeatureUnit() tiles of
  // intermediate features, for all the expert's tokens.
  void GateUp(const Expert& expert, TileRange tiles, int thread) const {
    const auto [begin, end] = tiles;
    std::array<TilePair, kMostPerTask * kMostFeatureTiles> w;
    int64_t pairs = 0;
    if (gated()) {
      for (int64_t tile = begin; tile < end; ++tile) {
        w[pairs++] = Operands(expert, Projection::kGate, tile, Projection::kUp, tile);
      }
    } else {
      for (int64_t tile = begin; tile < end; tile += TilePair::kCount) {
        const int64_t second = std::min(tile + 1, end - 1);
        w[pairs++] = Operands(expert, Projection::kUp, tile, Projection::kUp, second);
      }
    }
    LinkTiles(std::span(w.data(), pairs), path_.tiles_at_once(expert.form, expert.blocks));
    const Product product = ProductOf(expert, thread);
    path_.multiply(std::span(w.data(), pairs), expert.form,
                   shared_ ? hidden_.blocks : BlockAt(hidden_, expert, 0), Panel(thread), product);
    for (int64_t tile = begin; tile < end; tile += path_.feature_tiles) {
      const int count = static_cast<int>(std::min<int64_t>(path_.feature_tiles, end - tile));
      for (int64_t b = 0; b < expert.blocks.count(); ++b) {
        StageFeatures(expert, b, tile, count, product, tile - begin);
      }
    }
  }

  // Activates and stages features of block b of an expert's tokens: `count` tiles of them, from
  // tile `first` on, which are tiles `place` and following of the product. The product has a pair
  // of tiles, gate and up, for each tile, or without a gate a pair for every two tiles.
  void StageFeatures(const Expert& expert, int64_t b, int64_t first, int count,
                     const Product& product, int64_t place) const {
    const int64_t features = weights_.layout(Projection::kGate).rows();
    const int64_t row = first * kTileRows;
    const int rows = path_.feature_tiles * kTileRows;
    // The last tiles also fill the last group, with zeros.
    const bool last = first + count == GateTiles();
    const int64_t end = last ? PaddedColumns(features) - row : rows;
    Vec gate_bias[kMostFeatureTiles], up_bias[kMostFeatureTiles];
    for (int i = 0; i < count; ++i) {
      gate_bias[i] = BiasOf(expert, Projection::kGate, first + i);
      up_bias[i] = BiasOf(expert, Projection::kUp, first + i);
    }
    const Vec gate_factor = FactorOf(expert, Projection::kGate);
    const Vec up_factor = FactorOf(expert, Projection::kUp);
    std::byte* block = BlockAt(intermediate_, expert, b);
    const int tokens = expert.blocks.Size(b);
    const Glu& glu = weights_.config().glu;
    for (int t = 0; t < tokens; ++t) {
      alignas(64) float h[kGroupSize];
      // Chosen here, so that staging, which is far more code, is not instantiated per function.
      VisitGluFunction(glu.function, [&](auto function) __attribute__((always_inline)) {
        for (int i = 0; i < count; ++i) {
          const int64_t tile = place + i;
          if (!glu.gated) {
            constexpr int kCount = TilePair::kCount;
            const float* sums = product.At(tile / kCount, b, static_cast<int>(tile % kCount), t);
            const Vec up = Isa::Fma(Isa::Load(sums), up_factor, up_bias[i]);
            Isa::Store(h + i * kTileRows, Activate<Isa, function()>(glu, up));
            continue;
          }
          const Vec gate =
              Isa::Fma(Isa::Load(product.At(tile, b, 0, t)), gate_factor, gate_bias[i]);
          const Vec up = Isa::Fma(Isa::Load(product.At(tile, b, 1, t)), up_factor, up_bias[i]);
          Isa::Store(h + i * kTileRows, Activate<Isa, function()>(glu, gate, up));
        }
      });
      if (last) std::fill(h + (features - row), h + end, 0.0f);
      for (int64_t i = 0; i < end; i += rows) {
        path_.stage_features(expert.form, args_.input_dtype, h + i, row + i, t, tokens,
                             Intermediate(), block);
      }
    }
  }

  // A task of down: up to outputs_per_task_ pairs of tiles of output features, for all tokens and
  // all their experts.
  void Down(TileRange tiles, int thread) const {
    const int64_t width = outputs_per_task_ * TilePair::kCount;
    const auto [begin, end] = tiles;
    float* sums = Sums(thread);
    std::memset(sums, 0, ProductBytes(outputs_per_task_, tokens_));
    for (int64_t e = 0; e < std::ssize(experts_); ++e) AddExpert(e, begin, end, sums, thread);
    const int64_t row = begin * kTileRows;
    const int64_t rows = std::min(end * kTileRows, HiddenSize()) - row;
    for (int64_t t = 0; t < tokens_; ++t) {
      std::byte* out = static_cast<std::byte*>(args_.output) +
                       ((begin_ + t) * HiddenSize() + row) * ByteSize(args_.output_dtype);
      const float* sum = sums + t * width * kTileRows;
      if (args_.accumulate) {
        AddRow(sum, rows, reinterpret_cast<float*>(out));
      } else {
        ConvertRow(args_.output_dtype, sum, rows, out);
      }
    }
  }

  // sums[token][tile][16] += weight * (factor * down * h + bias), for expert `index` and tiles
  // [begin, end).
  void AddExpert(int64_t index, int64_t begin, int64_t end, float* sums, int thread) const {
    const Expert& expert = experts_[index];
    std::array<TilePair, kMostPerTask + 1> w;
    const auto pair_at = [&](const Expert& of, int64_t tile) {
      return Operands(of, Projection::kDown, tile, Projection::kDown, std::min(tile + 1, end - 1));
    };
    int64_t count = 0;
    for (int64_t tile = begin; tile < end; tile += TilePair::kCount) {
      w[count++] = pair_at(expert, tile);
    }
    const bool last = index + 1 == std::ssize(experts_);
    if (!last) w[count] = pair_at(experts_[index + 1], begin);
    LinkTiles(std::span(w.data(), count + (last ? 0 : 1)),
              path_.tiles_at_once(expert.form, expert.blocks));
    const Product product = ProductOf(expert, thread);
    path_.multiply(std::span(w.data(), count), expert.form, BlockAt(intermediate_, expert, 0),
                   Panel(thread), product);
    for (int64_t tile = begin; tile < end; ++tile) {
      AddTile(expert, tile, product.Pair((tile - begin) / TilePair::kCount),
              static_cast<int>((tile - begin) % TilePair::kCount),
              sums + (tile - begin) * kTileRows);
    }
  }

  // Adds the product of one tile to `sums` as AddExpert says. The tile is the r-th of the pair that
  // `product` has.
  void AddTile(const Expert& expert, int64_t tile, const Product& product, int r,
               float* sums) const {
    const TokenBlocks& blocks = expert.blocks;
    const Vec bias = BiasOf(expert, Projection::kDown, tile);
    const Vec factor = FactorOf(expert, Projection::kDown);
    const int64_t stride = outputs_per_task_ * TilePair::kCount * kTileRows;
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const int tokens = blocks.Size(b);
      float* in = product.At(0, b);
      for (int t = 0; t < tokens; ++t) {
        const int64_t pair = expert.begin + blocks.Begin(b) + t;
        float* sum = sums + routing_.tokens()[pair] * stride;
        const Vec y = Isa::Fma(Isa::Load(SumsAt(in, r, t, tokens)), factor, bias);
        Isa::Store(sum, AddWeighted<Isa>(routing_.weights()[pair], y, Isa::Load(sum)));
      }
    }
  }

  TilePair Operands(const Expert& expert, Projection p0, int64_t tile0, Projection p1,
                    int64_t tile1) const {
    return {.tiles = {weights_.Tile(expert.id, p0, tile0), weights_.Tile(expert.id, p1, tile1)},
            .groups = weights_.layout(p0).groups(),
            .fold = expert.fold};
  }

  Vec FactorOf(const Expert& expert, Projection p) const {
    return Isa::Broadcast(weights_.Factor(expert.id, p));
  }

  // The biases of the rows of `tile`, with zeros for rows that the last tile does not have.
  Vec BiasOf(const Expert& expert, Projection p, int64_t tile) const {
    return LoadTileRows<Isa>(weights_.Bias(expert.id, p), tile * kTileRows,
                             weights_.layout(p).rows());
  }

  bool gated() const { return weights_.config().glu.gated; }
  // Tiles of intermediate features that are multiplied together, or a multiple of so many. A pair
  // of tiles has gate and up, or without a gate two tiles of up.
  int64_t FeatureUnit() const {
    return gated() ? path_.feature_tiles : std::max<int64_t>(path_.feature_tiles, TilePair::kCount);
  }
  int64_t GateTiles() const { return weights_.layout(Projection::kGate).tiles(); }
  int64_t DownTiles() const { return weights_.layout(Projection::kDown).tiles(); }
  int64_t HiddenSize() const { return weights_.config().hidden_size; }
  int64_t Intermediate() const { return weights_.config().intermediate_size; }
  const std::byte* Row(int64_t token) const {
    return static_cast<const std::byte*>(args_.hidden_states) +
           (begin_ + token) * args_.hidden_stride * ByteSize(args_.input_dtype);
  }
  // The address of block b of an expert's tokens.
  std::byte* BlockAt(const Staged& staged, const Expert& expert, int64_t b) const {
    return staged.blocks + expert.begin * staged.bytes_per_pair +
           expert.blocks.Begin(b) * path_.staged_bytes(expert.form, staged.columns);
  }
  int64_t MostStagedBytes(int64_t columns) const {
    int64_t most = 0;
    for (const StagedForm form : kStagedForms) {
      most = std::max(most, path_.staged_bytes(form, columns));
    }
    return RoundUp(most, int64_t{AlignedBuffer::kCacheLine});
  }
  std::byte* Panel(int thread) const { return workspace_.Scratch(thread); }
  Product ProductOf(const Expert& expert, int thread) const {
    return {reinterpret_cast<float*>(workspace_.Scratch(thread) + product_offset_), expert.blocks};
  }
  float* Sums(int thread) const {
    return reinterpret_cast<float*>(workspace_.Scratch(thread) + sums_offset_);
  }

  // The bytes of the fp32 sums of `tokens` tokens with so many pairs of tiles.
  static constexpr int64_t ProductBytes(int64_t pairs, int64_t tokens) {
    return Product::Size(pairs, tokens) * int64_t{sizeof(float)};
  }

  const PackedExperts& weights_;
  const ComputePath& path_;
  const ForwardArgs& args_;
  ThreadPool& pool_;
  Workspace& workspace_;
  Routing& routing_;
  std::vector<Expert>& experts_;  // that have tokens in this round, in ascending order
  int64_t most_tokens_ = 0;       // of an expert
  int64_t begin_ = 0;
  int64_t tokens_ = 0;
  // All experts read one block: the only token, which each expert gets once.
  bool shared_ = false;
  Staged hidden_;
  Staged intermediate_;
  int64_t features_per_task_ = 1;  // in units of FeatureUnit() tiles
  int64_t outputs_per_task_ = 1;   // in pairs of tiles
  int64_t product_offset_ = 0;     // the layout of a thread's scratch is panel | product | sums
  int64_t sums_offset_ = 0;
};

template <class Isa>
void ForwardExperts(const PackedExperts& weights, const ComputePath& path, const ForwardArgs& args,
                    ThreadPool& pool, Workspace& workspace) {
  // Rounds bound the memory for staged activations, however long the prompt is.
  constexpr int64_t kMaxRoundPairs = 16384;
  const int64_t round = kMaxRoundPairs / std::clamp<int64_t>(args.routing.top_k, 1, kMaxRoundPairs);
  ForwardPass<Isa> pass(weights, path, args, pool, workspace);
  for (int64_t begin = 0; begin < args.tokens; begin += round) {
    pass.Run(begin, std::min(begin + round, args.tokens));
  }
}

}  // namespace cpumoe
