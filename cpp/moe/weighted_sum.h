// The interface of weighted sums of rows: what a forward pass does with the results of a token's
// experts, for results that were computed apart from each other.
#pragma once

#include <cstdint>

#include "base/float_types.h"

namespace cpumoe {

// output[t] = sum of weights[i] * terms[rows[i]] for i in [begins[t], begins[t + 1]), added in
// order of i with the roundings of a forward pass. A token without terms gets zeros.
struct WeightedSumArgs {
  DType output_dtype = DType::kFp32;
  int64_t tokens = 0;
  int64_t columns = 0;
  const float* terms = nullptr;  // [num_rows, columns]
  int64_t num_rows = 0;
  const int64_t* begins = nullptr;  // [tokens + 1], ascending from 0
  const int64_t* rows = nullptr;    // [begins[tokens]]
  const float* weights = nullptr;   // [begins[tokens]]
  void* output = nullptr;           // [tokens, columns], dense
};

}  // namespace cpumoe
