// Sums of results that were computed apart from each other, as calls of a layer add theirs.
#pragma once

#include <string>

#include "engine/runtime.h"
#include "moe/weighted_sum.h"
#include "variant/variant_api.h"

namespace cpumoe {

// Sums with the roundings of a variant. They need neither Python nor the GIL.
class WeightedSums {
 public:
  // `origin` names who asked for the variant, for errors. Throws std::invalid_argument, and
  // std::runtime_error if the variant's library is missing or damaged.
  WeightedSums(const std::string& isa, const std::string& origin);

  // Any number of threads may do so at once. Throws std::invalid_argument (an address is null, a
  // number is out of range), std::out_of_range (a row), and std::runtime_error (the runtime is
  // closed, or belongs to the process that forked this one).
  void Execute(Runtime& runtime, const WeightedSumArgs& args) const;

 private:
  const VariantApi& variant_;
};

}  // namespace cpumoe
