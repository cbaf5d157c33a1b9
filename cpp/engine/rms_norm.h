// RMS norms of rows (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019):
//
//   y = x / sqrt(mean(x^2) + eps) * scale
//
// Models have many of them, and each takes microseconds of a new token's time. They need no
// variant, because a row is in the caches and the baseline's instructions reach the caches' speed.
#pragma once

#include <cstdint>

#include "base/float_types.h"
#include "engine/runtime.h"

namespace cpumoe {

struct RmsNormArgs {
  DType dtype = DType::kBf16;  // of x and y
  int64_t rows = 0;
  int64_t columns = 0;
  const void* x = nullptr;  // [rows, columns], contiguous
  void* y = nullptr;        // [rows, columns], contiguous, may be x
  DType weight_dtype = DType::kBf16;
  const void* weight = nullptr;  // [columns]; null: the scale is 1
  bool one_plus = false;         // the scale is 1 + weight, else the weight
  double eps = 0;
};

// Sums are as exact as fp32 results need, scales and products are fp32, and a result is rounded
// once to its dtype. A row's result depends on this row alone. Few rows are computed by the calling
// thread, and more by the runtime's threads. Throws std::invalid_argument (an address is null, a
// size is out of range) and, for many rows, std::runtime_error (the runtime is closed, or belongs
// to the process that forked this one).
void RmsNorm(Runtime& runtime, const RmsNormArgs& args);

// Whether the runtime's threads compute a norm of so many elements.
bool IsLongRmsNorm(int64_t rows, int64_t columns);

}  // namespace cpumoe
