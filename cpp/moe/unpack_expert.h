// Writes a packed expert back as its checkpoint stores it, in tasks for any number of threads.
#pragma once

#include <cstdint>
#include <span>

#include "base/bits.h"
#include "moe/moe.h"
#include "moe/packed_experts.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// The tasks of all destinations, one after the other. A task is a run of tiles.
class ExpertUnpacker {
 public:
  // Throws std::invalid_argument.
  ExpertUnpacker(const PackedExperts& weights, std::span<const ExpertDestination> out);

  int64_t tasks() const { return tasks_; }

  // Does tasks [begin, end) for an expert that has weights. Throws std::invalid_argument.
  void Run(int64_t expert, int64_t begin, int64_t end, ThreadPool& pool) const;

 private:
  // The tasks of a destination: first those of gate and up, then those of down.
  struct Split {
    int64_t first_pair, pairs, pairs_per_task;  // tiles of gate and up
    int64_t downs, downs_per_task;

    int64_t pair_tasks() const { return CeilDiv(pairs, pairs_per_task); }
    int64_t tasks() const { return pair_tasks() + CeilDiv(downs, downs_per_task); }
  };

  bool gated() const { return weights_.config().glu.gated; }
  Split SplitOf(const ExpertDestination& out) const;
  void RunTask(int64_t copy, const ExpertDestination& out, const Split& split, int64_t task) const;
  void UnpackTile(int64_t copy, Projection p, int64_t tile, int64_t row, int64_t column,
                  const MutableRawMatrix& out) const;
  void RequireFits(const ExpertDestination& out) const;
  void RequireScales(int64_t copy) const;

  const PackedExperts& weights_;
  const std::span<const ExpertDestination> out_;
  int64_t tasks_ = 0;
};

}  // namespace cpumoe
