// y = x W^T for few tokens, where W lies in memory as PyTorch stores it, row after row.
//
// A head that shares its weights with the embedding cannot be packed: the embedding reads single
// rows, and a packed copy would be a second one. For few tokens, reading W from memory takes longer
// than all else, so that neither packing nor a variant is needed.
#pragma once

#include <cstdint>

#include "base/float_types.h"
#include "engine/runtime.h"

namespace cpumoe {

struct RowProductArgs {
  DType dtype = DType::kBf16;  // of x, w and y: kBf16 or kFp32
  int64_t tokens = 0;          // at most kMostRowProductTokens
  int64_t rows = 0;            // N
  int64_t columns = 0;         // K
  const void* x = nullptr;     // [tokens, columns], contiguous
  const void* w = nullptr;     // [rows, columns], contiguous
  void* y = nullptr;           // [tokens, rows], contiguous
};

constexpr int64_t kMostRowProductTokens = 4;

// Products and sums are fp32, and a result is rounded once. It depends neither on the other tokens
// nor on the number of threads. Throws std::invalid_argument (an address is null, a size is out of
// range), and std::runtime_error (the runtime is closed, or belongs to the process that forked this
// one).
void RowProduct(Runtime& runtime, const RowProductArgs& args);

}  // namespace cpumoe
