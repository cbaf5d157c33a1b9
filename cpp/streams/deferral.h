// Deferral: some experts of a layer are computed while the host goes on to the next layer, and
// their sum is added to the next layer's output.
//
//   stream:  layer 1 | wait | attention ...  layer 2 | wait
//   CPU:     └ now ──┘ later ──────────────┘ └ now ──┘        later(1) is added to now(2)
//
// The host must know that the result differs from the model's, and usually gives the last layer no
// deferral.
#pragma once

#include <cstdint>
#include <vector>

#include "base/float_types.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// Divides the experts of a call into those that are computed now and later.
//
// An expert is computed now, for all tokens of the call, if for any token it is among all but the
// `deferred` least of the token's weights. The first of equal weights counts as greater.
class ExpertSplit {
 public:
  // Moves the ids of experts that are computed later from `ids`, [tokens, top_k], to later_ids(),
  // and leaves -1 in their places. Returns whether there are any. Ids that name no expert stay.
  template <class Id>
  bool Move(Id* ids, const float* weights, int64_t tokens, int64_t top_k, int64_t deferred,
            int64_t num_experts);

  // [tokens, top_k], as wide as the ids that were moved, with -1 where nothing was moved from.
  const void* later_ids() const { return later_ids_.data(); }

 private:
  std::vector<uint8_t> is_now_;
  std::vector<int64_t> later_ids_;  // or pairs of 32-bit ids
};

// The sum of deferred experts, which the model's next layer adds to its output. Only jobs use the
// sum, one after the other.
class DeferredSum {
 public:
  bool empty() const { return values_.empty(); }
  // The layer whose experts the sum has.
  int64_t layer() const { return layer_; }
  // Whether a call of so many elements adds the sum: a pass over the model goes up through the
  // layers, so another order means that the sum's pass has ended early.
  bool Fits(int64_t layer, int64_t elements) const {
    return std::ssize(values_) == elements && layer > layer_;
  }
  void Drop() { values_.clear(); }
  // Makes room for a sum of so many elements.
  void Make(int64_t layer, int64_t elements) {
    values_.resize(elements);
    layer_ = layer;
  }
  float* data() { return values_.data(); }

 private:
  std::vector<float> values_;
  int64_t layer_ = 0;
};

// Converts `count` numbers to `dtype`, rounding to nearest even.
void ConvertTo(DType dtype, const float* from, int64_t count, void* to, ThreadPool& pool);

}  // namespace cpumoe
