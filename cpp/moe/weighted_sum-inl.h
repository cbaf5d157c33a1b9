// Weighted sums of the results of experts. A forward pass adds results by AddWeighted, so that sums
// of results that were computed apart from each other have the bits of a forward pass.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/bits.h"
#include "kernels/tile.h"
#include "moe/weighted_sum.h"
#include "staging/stage-inl.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// sum + weight * y, by one multiply-add of the ISA.
template <class Isa>
typename Isa::Vec AddWeighted(float weight, typename Isa::Vec y, typename Isa::Vec sum) {
  return Isa::Fma(Isa::Broadcast(weight), y, sum);
}

// A piece of the work is a block of columns of one token. A task is a few pieces: so many that a
// call of few tokens is one task, because waking a thread would take longer.
template <class Isa>
class WeightedSum {
 public:
  explicit WeightedSum(const WeightedSumArgs& args)
      : args_(args), blocks_(CeilDiv(args.columns, kBlock)) {}

  void Run(ThreadPool& pool) const {
    const int64_t pieces = args_.tokens * blocks_;
    if (pieces == 0) return;
    const int64_t terms = CeilDiv(args_.begins[args_.tokens] + args_.tokens, args_.tokens);
    const int64_t per_task =
        std::max<int64_t>(1, kTaskElements / (terms * std::min(kBlock, args_.columns)));
    pool.For(CeilDiv(pieces, per_task), [&](int64_t task, int) {
      const int64_t end = std::min((task + 1) * per_task, pieces);
      for (int64_t piece = task * per_task; piece < end; ++piece) {
        Sum(piece / blocks_, piece % blocks_ * kBlock);
      }
    });
  }

 private:
  static constexpr int64_t kBlock = 512;  // columns, whose sums stay in L1
  static constexpr int64_t kTaskElements = 1 << 16;
  static_assert(kBlock % kTileRows == 0);

  // The sums of a token from column `begin` on.
  void Sum(int64_t token, int64_t begin) const {
    alignas(64) float sums[kBlock] = {};
    const int64_t end = std::min(begin + kBlock, args_.columns);
    const int64_t whole = begin + (end - begin) / kTileRows * kTileRows;
    for (int64_t i = args_.begins[token]; i < args_.begins[token + 1]; ++i) {
      const float* row = args_.terms + args_.rows[i] * args_.columns;
      const float weight = args_.weights[i];
      float* sum = sums;
      for (int64_t column = begin; column < whole; column += kTileRows, sum += kTileRows) {
        Isa::Store(sum, AddWeighted<Isa>(weight, Isa::Load(row + column), Isa::Load(sum)));
      }
      if (whole == end) continue;
      Isa::Store(sum, AddWeighted<Isa>(weight, LoadTileRows<Isa>(row, whole, end), Isa::Load(sum)));
    }
    ConvertRow(args_.output_dtype, sums, end - begin,
               static_cast<std::byte*>(args_.output) +
                   (token * args_.columns + begin) * ByteSize(args_.output_dtype));
  }

  const WeightedSumArgs& args_;
  const int64_t blocks_;
};

}  // namespace cpumoe
