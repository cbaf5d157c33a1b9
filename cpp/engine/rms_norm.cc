#include "engine/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "base/bits.h"
#include "base/check.h"

namespace cpumoe {
namespace {

// A piece of a row, as fp32 on the stack.
constexpr int64_t kPiece = 256;
// Partial sums of a piece, which compilers keep in vectors.
constexpr int64_t kLanes = 16;
// Elements of a task. A task takes about ten times as long as handing it to another thread.
constexpr int64_t kTaskElements = int64_t{1} << 14;
constexpr int64_t kMostRows = int64_t{1} << 40;
constexpr int64_t kMostColumns = int64_t{1} << 22;

template <class T>
float ToFloat(T value) {
  return value.ToFloat();
}
float ToFloat(float value) { return value; }

const std::byte* At(DType dtype, const void* elements, int64_t index) {
  return static_cast<const std::byte*>(elements) + index * ByteSize(dtype);
}

// Converts n elements from `first` on.
void Load(DType dtype, const void* elements, int64_t first, int64_t n, float* out) {
  VisitElements(dtype, At(dtype, elements, first), [&](const auto* in) {
    for (int64_t i = 0; i < n; ++i) out[i] = ToFloat(in[i]);
  });
}

void Store(DType dtype, const float* values, int64_t first, int64_t n, void* elements) {
  void* to = static_cast<std::byte*>(elements) + first * ByteSize(dtype);
  switch (dtype) {
    case DType::kBf16: {
      auto* out = static_cast<Bf16*>(to);
      for (int64_t i = 0; i < n; ++i) out[i] = Bf16::FromFloat(values[i]);
      return;
    }
    case DType::kFp16: {
      auto* out = static_cast<Fp16*>(to);
      for (int64_t i = 0; i < n; ++i) out[i] = Fp16::FromFloat(values[i]);
      return;
    }
    case DType::kFp32:
      std::copy_n(values, n, static_cast<float*>(to));
  }
}

// Partial sums have few terms, and their sum is exact enough for any number of columns.
double SumOfSquares(const RmsNormArgs& args, int64_t start) {
  double sum = 0;
  float x[kPiece];
  for (int64_t k = 0; k < args.columns; k += kPiece) {
    const int64_t n = std::min(kPiece, args.columns - k);
    Load(args.dtype, args.x, start + k, n, x);
    std::fill(x + n, x + RoundUp(n, kLanes), 0.0f);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
    }
    for (const float lane : lanes) sum += lane;
  }
  return sum;
}

void NormRow(const RmsNormArgs& args, int64_t row) {
  const int64_t start = row * args.columns;
  const double mean = SumOfSquares(args, start) / static_cast<double>(args.columns);
  const auto factor = static_cast<float>(1 / std::sqrt(mean + args.eps));
  float values[kPiece], scales[kPiece];
  for (int64_t k = 0; k < args.columns; k += kPiece) {
    const int64_t n = std::min(kPiece, args.columns - k);
    Load(args.dtype, args.x, start + k, n, values);
    for (int64_t i = 0; i < n; ++i) values[i] *= factor;
    if (args.weight != nullptr) {
      Load(args.weight_dtype, args.weight, k, n, scales);
      if (args.one_plus) {
        for (int64_t i = 0; i < n; ++i) scales[i] += 1;
      }
      for (int64_t i = 0; i < n; ++i) values[i] *= scales[i];
    }
    Store(args.dtype, values, start + k, n, args.y);
  }
}

}  // namespace

bool IsLongRmsNorm(int64_t rows, int64_t columns) {
  return rows > 1 && rows * columns > 2 * kTaskElements;
}

void RmsNorm(Runtime& runtime, const RmsNormArgs& args) {
  Require(args.columns >= 1 && args.columns <= kMostColumns, "columns: expected 1 to ",
          kMostColumns, ", got ", args.columns);
  Require(args.rows >= 0 && args.rows <= kMostRows, "rows: expected 0 to ", kMostRows, ", got ",
          args.rows);
  Require(args.eps >= 0, "eps: expected a number that is not negative, got ", args.eps);
  if (args.rows == 0) return;
  RequireAddress(args.x, "x");
  RequireAddress(args.y, "y");
  if (!IsLongRmsNorm(args.rows, args.columns)) {
    for (int64_t row = 0; row < args.rows; ++row) NormRow(args, row);
    return;
  }
  const int64_t rows_per_task = std::max<int64_t>(1, kTaskElements / args.columns);
  runtime.Execute([&](Node& node) {
    node.pool().For(CeilDiv(args.rows, rows_per_task), [&](int64_t task, int /*thread*/) {
      const int64_t first = task * rows_per_task;
      const int64_t end = std::min(args.rows, first + rows_per_task);
      for (int64_t row = first; row < end; ++row) NormRow(args, row);
    });
  });
}

}  // namespace cpumoe
