#include "engine/row_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/bits.h"
#include "base/check.h"

namespace cpumoe {
namespace {

// Four products, which is what a register of the baseline holds.
using Floats __attribute__((vector_size(16))) = float;
using Words __attribute__((vector_size(16))) = uint32_t;
constexpr int64_t kWidth = 4;
// Each token has so many registers of sums, so that additions do not wait for one another.
constexpr int64_t kSums = 4;
constexpr int64_t kStep = kWidth * kSums;

// Weights of a task.
constexpr int64_t kTaskBytes = int64_t{256} << 10;
constexpr int64_t kMostSize = int64_t{1} << 24;

template <class Vector>
Vector Load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Weights of a step, a register each. The activations of a step are in the same order: bf16 weights
// come in pairs, and the even ones of four pairs come before the odd ones.
Floats Weights(const float* w, int64_t i) { return Load<Floats>(w + i * kWidth); }
Floats Weights(const Bf16* w, int64_t i) {
  const auto pairs = Load<Words>(w + i / 2 * 2 * kWidth);
  const Words words = i % 2 == 0 ? pairs << 16 : pairs & 0xffff0000u;
  return Load<Floats>(&words);
}

float ToFloat(float value) { return value; }
float ToFloat(Bf16 value) { return value.ToFloat(); }

// Where a step has the activation that is multiplied by its weight i.
template <class T>
constexpr int64_t PlaceInStep(int64_t i) {
  if constexpr (sizeof(T) == sizeof(float)) return i;
  return i / 8 * 8 + i % 2 * kWidth + i % 8 / 2;
}

// Activations [tokens][steps * kStep] in fp32. Zeros follow a row.
template <class T>
std::vector<float> Stage(const RowProductArgs& args, int64_t steps) {
  std::vector<float> staged(args.tokens * steps * kStep);
  const T* x = static_cast<const T*>(args.x);
  for (int64_t t = 0; t < args.tokens; ++t) {
    float* row = &staged[t * steps * kStep];
    for (int64_t k = 0; k < args.columns; ++k) {
      row[k / kStep * kStep + PlaceInStep<T>(k % kStep)] = ToFloat(x[t * args.columns + k]);
    }
  }
  return staged;
}

// Multiplies a row of weights by all tokens. A token's sum does not depend on kTokens.
template <class T, int kTokens>
void MultiplyRow(const T* w, const float* x, int64_t columns, int64_t steps, float* sums) {
  Floats totals[kTokens][kSums] = {};
  const auto add = [&](const T* from, int64_t step) {
    for (int64_t i = 0; i < kSums; ++i) {
      const Floats weights = Weights(from, i);
      for (int t = 0; t < kTokens; ++t) {
        totals[t][i] += weights * Load<Floats>(x + (t * steps + step) * kStep + i * kWidth);
      }
    }
  };
  const int64_t whole = columns / kStep;
  for (int64_t step = 0; step < whole; ++step) add(w + step * kStep, step);
  if (whole < steps) {
    T rest[kStep] = {};
    std::copy(w + whole * kStep, w + columns, rest);
    add(rest, whole);
  }
  for (int t = 0; t < kTokens; ++t) {
    const Floats total = (totals[t][0] + totals[t][1]) + (totals[t][2] + totals[t][3]);
    sums[t] = (total[0] + total[1]) + (total[2] + total[3]);
  }
}

template <class T>
void StoreSum(float sum, T* y) {
  if constexpr (sizeof(T) == sizeof(float)) {
    *y = sum;
  } else {
    *y = T::FromFloat(sum);
  }
}

template <class T, int kTokens>
void MultiplyRows(const RowProductArgs& args, const float* x, int64_t steps, int64_t begin,
                  int64_t end) {
  const T* w = static_cast<const T*>(args.w);
  T* y = static_cast<T*>(args.y);
  float sums[kTokens];
  for (int64_t row = begin; row < end; ++row) {
    MultiplyRow<T, kTokens>(w + row * args.columns, x, args.columns, steps, sums);
    for (int t = 0; t < kTokens; ++t) StoreSum(sums[t], y + t * args.rows + row);
  }
}

template <class T>
void Compute(Runtime& runtime, const RowProductArgs& args) {
  const int64_t steps = CeilDiv(args.columns, kStep);
  const std::vector<float> x = Stage<T>(args, steps);
  static_assert(kMostRowProductTokens == 4);
  constexpr decltype(&MultiplyRows<T, 1>) kMultiply[] = {&MultiplyRows<T, 1>, &MultiplyRows<T, 2>,
                                                         &MultiplyRows<T, 3>, &MultiplyRows<T, 4>};
  const auto multiply = kMultiply[args.tokens - 1];
  const int64_t row_bytes = args.columns * int64_t{sizeof(T)};
  const int64_t rows_per_task = std::max<int64_t>(1, kTaskBytes / row_bytes);
  runtime.Execute([&](Node& node) {
    node.pool().For(CeilDiv(args.rows, rows_per_task), [&](int64_t task, int /*thread*/) {
      const int64_t begin = task * rows_per_task;
      multiply(args, x.data(), steps, begin, std::min(args.rows, begin + rows_per_task));
    });
  });
}

}  // namespace

void RowProduct(Runtime& runtime, const RowProductArgs& args) {
  Require(args.dtype != DType::kFp16, "dtype: expected bf16 or fp32, got fp16");
  Require(args.tokens >= 0 && args.tokens <= kMostRowProductTokens, "tokens: expected 0 to ",
          kMostRowProductTokens, ", got ", args.tokens);
  Require(args.rows >= 1 && args.rows <= kMostSize, "rows: expected 1 to ", kMostSize, ", got ",
          args.rows);
  Require(args.columns >= 1 && args.columns <= kMostSize, "columns: expected 1 to ", kMostSize,
          ", got ", args.columns);
  if (args.tokens == 0) return;
  RequireAddress(args.x, "x");
  RequireAddress(args.w, "w");
  RequireAddress(args.y, "y");
  if (args.dtype == DType::kFp32) {
    Compute<float>(runtime, args);
  } else {
    Compute<Bf16>(runtime, args);
  }
}

}  // namespace cpumoe
