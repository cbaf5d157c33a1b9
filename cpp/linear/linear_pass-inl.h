// The definition of ForwardLinear, for the one translation unit of a variant that instantiates it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "base/bits.h"
#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"
#include "linear/linear_pass.h"
#include "packing/tile_shares.h"
#include "staging/stage-inl.h"

namespace cpumoe {

// One round of a call: a bounded number of tokens.
//
//   stage      gather tokens into blocks, converted for the multiplier (path.h)
//   multiply   task = a few pairs of tiles of output features, all tokens; bias; convert to the
//              output's dtype
//
// Sums run in a fixed order, so results are bit-identical for any number of threads.
template <class Isa>
class LinearPass {
  using Vec = typename Isa::Vec;

 public:
  LinearPass(const PackedMatrix& matrix, const ComputePath& path, const LinearArgs& args,
             ThreadPool& pool, ScratchMemory& scratch)
      : matrix_(matrix), path_(path), args_(args), pool_(pool), scratch_(scratch) {}

  // Computes output rows [begin, end).
  void Run(int64_t begin, int64_t end) {
    begin_ = begin;
    const int64_t tokens = end - begin;
    blocks_ = TokenBlocks(tokens, path_.block_tokens);
    form_ =
        path_.form_for(args_.input_dtype, tokens, path_.FewTokenLimit(matrix_.config().kernels));
    fold_ = path_.folds_exactly(matrix_.scale_range());
    const int64_t pairs = CeilDiv(Tiles(), int64_t{TilePair::kCount});
    const bool few = tokens <= path_.StreamedTokens();
    const int64_t most = std::clamp<int64_t>(kProductBytes / ProductBytes(1), 1, kMostPerTask);
    pairs_per_task_ =
        PiecesPerTask(pairs, pool_.num_threads() * (few ? kTasksOfFew : kTasksOfMany), most);
    staged_ = scratch_.Activations(tokens * path_.staged_bytes(form_, Columns()));
    scratch_.ReserveScratch(pool_.num_threads(), path_.panel_bytes + ProductBytes(pairs_per_task_));
    Stage();
    ForEachPiece(pool_, matrix_.shares(), pairs_per_task_ * TilePair::kCount, 1,
                 [&](int64_t, TileRange tiles, int thread) { Multiply(tiles, thread); });
  }

 private:
  static constexpr int64_t kMostPerTask = 16;  // pairs of tiles
  // Tasks per thread. With few tokens, weights stream from one pair of a task to the next without a
  // gap. With many tokens, the pairs of a task share the activations that a core fetches.
  static constexpr int64_t kTasksOfFew = 8;
  static constexpr int64_t kTasksOfMany = 4;
  // A task's product should stay in the core's L2.
  static constexpr int64_t kProductBytes = int64_t{512} << 10;

  void Stage() {
    std::array<int32_t, kMostBlockTokens> rows;
    std::iota(rows.begin(), rows.end(), 0);
    pool_.For(blocks_.count(), [&](int64_t b, int) {
      path_.stage_rows(form_, args_.input_dtype, Row(blocks_.Begin(b)), args_.x_stride, rows.data(),
                       blocks_.Size(b), Columns(), Block(b));
    });
  }

  // Pairs of tiles of output features, for all tokens.
  void Multiply(TileRange range, int thread) const {
    const int64_t begin = range.begin / TilePair::kCount;
    const int64_t end = CeilDiv(range.end, int64_t{TilePair::kCount});
    std::array<TilePair, kMostPerTask> w;
    const std::span pairs(w.data(), end - begin);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t tile = pair * TilePair::kCount;
      w[pair - begin] = {
          .tiles = {matrix_.Tile(tile), matrix_.Tile(std::min(tile + 1, Tiles() - 1))},
          .groups = matrix_.layout().groups(),
          .fold = fold_};
    }
    LinkTiles(pairs, path_.tiles_at_once(form_, blocks_));
    std::byte* panel = scratch_.Scratch(thread);
    const Product product(reinterpret_cast<float*>(panel + path_.panel_bytes), blocks_);
    path_.multiply(pairs, form_, Block(0), panel, product);
    const int64_t last = std::min(end * TilePair::kCount, Tiles());
    for (int64_t tile = begin * TilePair::kCount; tile < last; ++tile) {
      WriteTile(tile, product.Pair(tile / TilePair::kCount - begin), tile % TilePair::kCount);
    }
  }

  // output = factor * sums + bias, for a tile of output features. The tile is the r-th of the pair
  // that `product` has.
  void WriteTile(int64_t tile, const Product& product, int r) const {
    const int64_t row = tile * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, matrix_.layout().rows() - row);
    const Vec bias = LoadTileRows<Isa>(matrix_.bias(), row, matrix_.layout().rows());
    const Vec factor = Isa::Broadcast(matrix_.factor());
    const int64_t bytes = ByteSize(args_.output_dtype);
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      for (int t = 0; t < blocks_.Size(b); ++t) {
        alignas(64) float y[kTileRows];
        Isa::Store(y, Isa::Fma(Isa::Load(product.At(0, b, r, t)), factor, bias));
        const int64_t token = begin_ + blocks_.Begin(b) + t;
        ConvertRow(
            args_.output_dtype, y, rows,
            static_cast<std::byte*>(args_.output) + (token * args_.output_stride + row) * bytes);
      }
    }
  }

  int64_t Tiles() const { return matrix_.layout().tiles(); }
  int64_t Columns() const { return matrix_.layout().columns(); }
  const std::byte* Row(int64_t token) const {
    return static_cast<const std::byte*>(args_.x) +
           (begin_ + token) * args_.x_stride * ByteSize(args_.input_dtype);
  }
  // The address at which block b of the tokens is staged.
  std::byte* Block(int64_t b) const {
    return staged_ + blocks_.Begin(b) * path_.staged_bytes(form_, Columns());
  }
  int64_t ProductBytes(int64_t pairs) const {
    return Product::Size(pairs, blocks_.tokens()) * int64_t{sizeof(float)};
  }

  const PackedMatrix& matrix_;
  const ComputePath& path_;
  const LinearArgs& args_;
  ThreadPool& pool_;
  ScratchMemory& scratch_;
  int64_t begin_ = 0;
  TokenBlocks blocks_{0, 1};
  StagedForm form_{};
  bool fold_ = false;
  int64_t pairs_per_task_ = 1;
  std::byte* staged_ = nullptr;  // [tokens, in_features] in token blocks
};

template <class Isa>
void ForwardLinear(const PackedMatrix& matrix, const ComputePath& path, const LinearArgs& args,
                   ThreadPool& pool, ScratchMemory& scratch) {
  // Rounds bound the memory for staged activations, however long the prompt is.
  constexpr int kMostRoundTokens = 512;
  LinearPass<Isa> pass(matrix, path, args, pool, scratch);
  const TokenBlocks rounds(args.tokens, kMostRoundTokens);
  for (int64_t i = 0; i < rounds.count(); ++i) {
    pass.Run(rounds.Begin(i), rounds.Begin(i) + rounds.Size(i));
  }
}

}  // namespace cpumoe
