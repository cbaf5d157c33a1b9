// One round of the forward pass: a bounded number of tokens through all of a layer's experts.
//
//   route     group (token, slot) pairs by expert                                     (routing.h)
//   stage     gather each expert's tokens into blocks, converted for the multiplier   (stage-inl.h)
//   gate, up  task = one tile of gate and of up of one expert, all its tokens; activation; stage h
//   down      task = two tiles of output rows, all experts in ascending order; weighted sum;
//   convert
//
// A task's result depends on its own inputs only, and sums run in a fixed order: outputs are the
// same bit for bit for any number of threads. Every task of a phase reads the same number of weight
// bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/bits.h"
#include "kernels/tile_gemm-inl.h"
#include "moe/activation-inl.h"
#include "moe/expert_weights.h"
#include "packing/stage-inl.h"

namespace cpumoe {

// Operator is a MoeOperator: it has weights() and CodecFor().
template <class Isa, class Operator>
class ForwardPass {
  using Codec = typename Operator::Codec;
  using Tiles = TileGemm<Isa, Codec>;
  using Activation = typename Isa::Activation;
  using Vec = typename Isa::Vec;
  using Expert = Routing::Expert;

 public:
  ForwardPass(const Operator& op, const ForwardArgs& args, ThreadPool& pool, Workspace& workspace)
      : op_(op), args_(args), pool_(pool), workspace_(workspace), routing_(workspace.routing()) {}

  // Computes output rows [begin, end).
  void Run(int64_t begin, int64_t end) {
    begin_ = begin;
    tokens_ = end - begin;
    routing_.Build(args_.routing, begin, end, op_.weights().has_weights());
    shared_ = tokens_ == 1 && routing_.tokens().size() == routing_.experts().size();
    Reserve();
    if (!routing_.experts().empty()) Stage();
    const auto experts = static_cast<int64_t>(routing_.experts().size());
    const int64_t gate_tiles = op_.weights().layout(Projection::kGate).tiles();
    pool_.For(experts * gate_tiles, [&](int64_t task, int thread) {
      GateUp(routing_.experts()[task / gate_tiles], task % gate_tiles, thread);
    });
    const int64_t down_tiles = op_.weights().layout(Projection::kDown).tiles();
    pool_.For(CeilDiv(down_tiles, Tiles::kMaxTiles), [&](int64_t task, int thread) {
      const int64_t first = task * Tiles::kMaxTiles;
      Down(first, static_cast<int>(std::min<int64_t>(Tiles::kMaxTiles, down_tiles - first)),
           thread);
    });
  }

 private:
  void Reserve() {
    const auto pairs = static_cast<int64_t>(routing_.tokens().size());
    int64_t most = 0;
    for (const Expert& expert : routing_.experts()) most = std::max(most, expert.count);
    const int64_t element = sizeof(Activation);
    staged_ = reinterpret_cast<Activation*>(workspace_.Activations(pairs * HiddenSize() * element));
    intermediate_ =
        reinterpret_cast<Activation*>(workspace_.Intermediate(pairs * Intermediate() * element));
    product_offset_ = Tiles::kPanelBytes;
    sums_offset_ = product_offset_ + most * kTileBytes;
    workspace_.ReserveScratch(pool_.num_threads(), sums_offset_ + tokens_ * kTileBytes);
  }

  TokenBlocks BlocksOf(const Expert& expert) const {
    return TokenBlocks(expert.count, Isa::kPanelTokens);
  }

  void Stage() {
    if (shared_) {
      const int32_t token = 0;
      StageBlock<Isa>(args_.dtype, Row(0), 0, &token, 1, HiddenSize(), staged_);
      return;
    }
    std::vector<Workspace::Block>& blocks = workspace_.blocks();
    blocks.clear();
    for (const Expert& expert : routing_.experts()) {
      const TokenBlocks of = BlocksOf(expert);
      for (int64_t b = 0; b < of.count(); ++b) {
        blocks.push_back({expert.begin + of.Begin(b), of.Size(b)});
      }
    }
    pool_.For(static_cast<int64_t>(blocks.size()), [&](int64_t task, int) {
      const Workspace::Block& block = blocks[task];
      StageBlock<Isa>(args_.dtype, Row(0), args_.hidden_stride, &routing_.tokens()[block.pair],
                      block.tokens, HiddenSize(), staged_ + block.pair * HiddenSize());
    });
  }

  // Intermediate features [16 * tile, 16 * tile + 16) of one expert for all its tokens.
  void GateUp(const Expert& expert, int64_t tile, int thread) const {
    const ExpertWeights<typename Codec::Format>& weights = op_.weights();
    const auto& layout = weights.layout(Projection::kGate);
    const TokenBlocks blocks = BlocksOf(expert);
    const typename Tiles::Operands w = {.tiles = {weights.Tile(expert.id, Projection::kGate, tile),
                                                  weights.Tile(expert.id, Projection::kUp, tile)},
                                        .count = 2,
                                        .groups = layout.groups(),
                                        .fold = op_.FoldsExactly(expert.id)};
    const Activation* a = shared_ ? staged_ : staged_ + expert.begin * HiddenSize();
    float* product = Product(thread);
    Tiles::Run(op_.codec(), w, blocks, op_.config().batch_invariant, a, Panel(thread), product);

    const int64_t row = tile * kTileRows;
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, layout.rows() - row));
    const Vec gate_bias = BiasOf(expert, Projection::kGate, row, rows);
    const Vec up_bias = BiasOf(expert, Projection::kUp, row, rows);
    for (int64_t b = 0; b < blocks.count(); ++b) {
      const int tokens = blocks.Size(b);
      const float* gate = product + blocks.Begin(b) * 2 * kTileRows;
      const float* up = gate + tokens * kTileRows;
      const int64_t pair = expert.begin + blocks.Begin(b);
      Activation* out = intermediate_ + pair * Intermediate() + row * tokens;
      for (int t = 0; t < tokens; ++t) {
        const Vec h =
            Activate<Isa>(op_.config().swiglu, Isa::Add(Isa::Load(gate + t * kTileRows), gate_bias),
                          Isa::Add(Isa::Load(up + t * kTileRows), up_bias));
        StageTile<Isa>(h, t, tokens, rows, out);
      }
    }
  }

  // Output features of `count` tiles from `first` on, for all tokens and all their experts.
  void Down(int64_t first, int count, int thread) const {
    float* sums = Sums(thread);
    std::memset(sums, 0, tokens_ * kTileBytes);
    for (const Expert& expert : routing_.experts()) AddExpert(expert, first, count, sums, thread);
    const int64_t row = first * kTileRows;
    const int64_t rows = std::min<int64_t>(count * kTileRows, HiddenSize() - row);
    for (int64_t t = 0; t < tokens_; ++t) {
      std::byte* out = static_cast<std::byte*>(args_.output) +
                       ((begin_ + t) * HiddenSize() + row) * ByteSize(args_.dtype);
      ConvertRow(args_.dtype, sums + t * Tiles::kMaxTiles * kTileRows, rows, out);
    }
  }

  // sums[token][tile][16] += weight * (down * h + bias) of one expert.
  void AddExpert(const Expert& expert, int64_t first, int count, float* sums, int thread) const {
    const ExpertWeights<typename Codec::Format>& weights = op_.weights();
    const auto& layout = weights.layout(Projection::kDown);
    const TokenBlocks blocks = BlocksOf(expert);
    typename Tiles::Operands w = {.tiles = {},
                                  .count = count,
                                  .groups = layout.groups(),
                                  .fold = op_.FoldsExactly(expert.id)};
    for (int r = 0; r < count; ++r)
      w.tiles[r] = weights.Tile(expert.id, Projection::kDown, first + r);
    float* product = Product(thread);
    Tiles::Run(op_.codec(), w, blocks, op_.config().batch_invariant,
               intermediate_ + expert.begin * Intermediate(), Panel(thread), product);

    for (int r = 0; r < count; ++r) {
      const int64_t row = (first + r) * kTileRows;
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, layout.rows() - row));
      const Vec bias = BiasOf(expert, Projection::kDown, row, rows);
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int tokens = blocks.Size(b);
        const float* in = product + (blocks.Begin(b) * count + r * tokens) * kTileRows;
        for (int t = 0; t < tokens; ++t) {
          const int64_t pair = expert.begin + blocks.Begin(b) + t;
          float* sum = sums + (routing_.tokens()[pair] * Tiles::kMaxTiles + r) * kTileRows;
          const Vec y = Isa::Add(Isa::Load(in + t * kTileRows), bias);
          Isa::Store(sum, Isa::Fma(Isa::Broadcast(routing_.weights()[pair]), y, Isa::Load(sum)));
        }
      }
    }
  }

  Vec BiasOf(const Expert& expert, Projection p, int64_t row, int rows) const {
    const float* bias = op_.weights().Bias(expert.id, p);
    if (bias == nullptr) return Isa::Zero();
    float lane[kTileRows] = {};
    std::copy_n(bias + row, rows, lane);
    return Isa::Load(lane);
  }

  int64_t HiddenSize() const { return op_.config().hidden_size; }
  int64_t Intermediate() const { return op_.config().intermediate_size; }
  const std::byte* Row(int64_t token) const {
    return static_cast<const std::byte*>(args_.hidden_states) +
           (begin_ + token) * args_.hidden_stride * ByteSize(args_.dtype);
  }
  typename Isa::Pair* Panel(int thread) const {
    return reinterpret_cast<typename Isa::Pair*>(workspace_.Scratch(thread));
  }
  float* Product(int thread) const {
    return reinterpret_cast<float*>(workspace_.Scratch(thread) + product_offset_);
  }
  float* Sums(int thread) const {
    return reinterpret_cast<float*>(workspace_.Scratch(thread) + sums_offset_);
  }

  // fp32 sums of one token for the tiles of a task.
  static constexpr int64_t kTileBytes = Tiles::kMaxTiles * kTileRows * sizeof(float);

  const Operator& op_;
  const ForwardArgs& args_;
  ThreadPool& pool_;
  Workspace& workspace_;
  Routing& routing_;
  int64_t begin_ = 0;
  int64_t tokens_ = 0;
  bool shared_ = false;                 // all experts read one block: the only token, once each
  Activation* staged_ = nullptr;        // [pairs, hidden_size] in token blocks
  Activation* intermediate_ = nullptr;  // [pairs, intermediate_size] in the same blocks
  int64_t product_offset_ = 0;          // in a thread's scratch: panel | product | sums
  int64_t sums_offset_ = 0;
};

}  // namespace cpumoe
