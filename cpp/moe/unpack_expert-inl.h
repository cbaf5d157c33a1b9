// Writes a packed expert back as its checkpoint stores it, in tasks for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "base/bits.h"
#include "base/check.h"
#include "moe/moe.h"
#include "moe/packed_weights.h"
#include "packing/unpack-inl.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// The tasks of all destinations, one after the other. A task is a run of tiles.
template <class Isa, WeightFormat F>
class ExpertUnpacker {
 public:
  // Throws std::invalid_argument.
  ExpertUnpacker(const PackedWeights<F>& weights, std::span<const ExpertDestination> out)
      : weights_(weights), out_(out) {
    for (const ExpertDestination& each : out_) {
      RequireFits(each);
      tasks_ += SplitOf(each).tasks();
    }
  }

  int64_t tasks() const { return tasks_; }

  // Does tasks [begin, end) for an expert that has weights.
  void Run(int64_t expert, int64_t begin, int64_t end, ThreadPool& pool) const {
    const int64_t copy = weights_.config().CopyOf(expert);
    if constexpr (HasScales<F>) RequireScales(copy);
    pool.For(end - begin, [&](int64_t task, int /*thread*/) {
      task += begin;
      for (const ExpertDestination& each : out_) {
        const Split split = SplitOf(each);
        if (task < split.tasks()) {
          RunTask(copy, each, split, task);
          break;
        }
        task -= split.tasks();
      }
      Isa::FinishStreams();
    });
  }

 private:
  // How many bytes a task reads, about: enough to make handing it out negligible, and so few that
  // many threads share an expert.
  static constexpr int64_t kTaskBytes = int64_t{64} << 10;

  // The tasks of a destination: first those of gate and up, then those of down.
  struct Split {
    int64_t first_pair, pairs, pairs_per_task;  // tiles of gate and up
    int64_t downs, downs_per_task;

    int64_t pair_tasks() const { return CeilDiv(pairs, pairs_per_task); }
    int64_t tasks() const { return pair_tasks() + CeilDiv(downs, downs_per_task); }
  };

  bool gated() const { return weights_.config().glu.gated; }
  const PackedLayout<F>& gate_up() const { return weights_.layout(Projection::kGate); }
  const PackedLayout<F>& down() const { return weights_.layout(Projection::kDown); }

  Split SplitOf(const ExpertDestination& out) const {
    const int64_t begin = out.intermediate_begin, features = out.up.rows;
    const int64_t first = begin / kTileRows;
    const int64_t down_bytes = down().TileBytes() * features / weights_.config().intermediate_size;
    return {.first_pair = first,
            .pairs = features == 0 ? 0 : CeilDiv(begin + features, kTileRows) - first,
            .pairs_per_task = std::max<int64_t>(kTaskBytes / (2 * gate_up().TileBytes()), 1),
            .downs = features == 0 ? 0 : down().tiles(),
            .downs_per_task = std::max<int64_t>(kTaskBytes / std::max<int64_t>(down_bytes, 1), 1)};
  }

  void RunTask(int64_t copy, const ExpertDestination& out, const Split& split, int64_t task) const {
    if (task < split.pair_tasks()) {
      const int64_t end = std::min((task + 1) * split.pairs_per_task, split.pairs);
      for (int64_t pair = task * split.pairs_per_task; pair < end; ++pair) {
        const int64_t tile = split.first_pair + pair;
        if (gated()) UnpackTile(copy, Projection::kGate, tile, out.intermediate_begin, 0, out.gate);
        UnpackTile(copy, Projection::kUp, tile, out.intermediate_begin, 0, out.up);
      }
      return;
    }
    task -= split.pair_tasks();
    const int64_t end = std::min((task + 1) * split.downs_per_task, split.downs);
    for (int64_t tile = task * split.downs_per_task; tile < end; ++tile) {
      UnpackTile(copy, Projection::kDown, tile, 0, out.intermediate_begin, out.down);
    }
  }

  void UnpackTile(int64_t copy, Projection p, int64_t tile, int64_t row, int64_t column,
                  const MutableRawMatrix& out) const {
    TileUnpacker<Isa, F>::Unpack(weights_.Tile(copy, p, tile), tile, weights_.layout(p).rows(), row,
                                 column, out);
  }

  void RequireFits(const ExpertDestination& out) const {
    const MoeConfig& config = weights_.config();
    const int64_t begin = out.intermediate_begin, count = out.up.rows;
    Require(begin >= 0 && count >= 0 && begin + count <= config.intermediate_size &&
                begin % kGroupSize == 0 &&
                (count % kGroupSize == 0 || begin + count == config.intermediate_size),
            F::kName, ": intermediate features to export must be whole groups of ", kGroupSize,
            " within [0, ", config.intermediate_size, "), got [", begin, ", ", begin + count, ")");
    if (gated()) out.gate.RequireShape(count, config.hidden_size);
    out.up.RequireShape(count, config.hidden_size);
    out.down.RequireShape(config.hidden_size, count);
  }

  // Each destination must have a scale wherever the stored matrix begins another one, of a type
  // that holds it.
  void RequireScales(int64_t copy) const {
    const auto& [gate, up, down] = weights_.stored(copy);
    for (const ExpertDestination& each : out_) {
      if (gated()) RequireHoldsScales<F>(each.gate, each.intermediate_begin, 0, gate.grid);
      RequireHoldsScales<F>(each.up, each.intermediate_begin, 0, up.grid);
      RequireHoldsScales<F>(each.down, 0, each.intermediate_begin, down.grid);
    }
  }

  const PackedWeights<F>& weights_;
  const std::span<const ExpertDestination> out_;
  int64_t tasks_ = 0;
};

}  // namespace cpumoe
