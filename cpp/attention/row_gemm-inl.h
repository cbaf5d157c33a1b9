// C += A B for a few rows of A, in fp32.
//
//   A  [rows][depth]           an element is broadcast
//   B  [depth][vectors][16]    a vector is loaded
//   C  [rows][vectors][16]
//
// The sums of some rows and vectors stay in registers over the whole depth. A sum adds its products
// in ascending order, whatever the number of rows and vectors.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "kernels/tile.h"

namespace cpumoe {

struct RowGemmArgs {
  const float* a;
  int64_t a_stride;  // from row to row
  const float* b;
  int64_t b_stride;       // from one step of the depth to the next
  int64_t vector_stride;  // from one vector of B to the next
  float* c;
  int64_t c_stride;  // from row to row
  int64_t depth;
  bool accumulate;  // whether C has sums already
};

template <class Isa>
class RowGemm {
 public:
  static void Run(RowGemmArgs args, int64_t rows, int64_t vectors) {
    while (rows > 0) {
      const int64_t done = RowsAtOnce(rows);
      Dispatch<kMostRows>(args, done, vectors);
      args.a += done * args.a_stride;
      args.c += done * args.c_stride;
      rows -= done;
    }
  }

 private:
  static constexpr int kMostRows = Isa::kPanelTokens;
  // With fewer sums than this, each multiply-add would wait for the one before.
  static constexpr int kSums = kMostRows * Isa::kTiles;
  static constexpr int kMostVectors = 4;

  // The next smaller number of rows that has a kernel.
  static constexpr int Below(int rows) {
    return static_cast<int>(std::bit_floor(static_cast<unsigned>(rows - 1)));
  }
  static constexpr int VectorsFor(int rows) {
    const auto fit = static_cast<unsigned>(std::max(kSums / rows, 1));
    return std::min(static_cast<int>(std::bit_floor(fit)), kMostVectors);
  }

  // Cuts rows that are too many for one kernel, and too few for two whole ones, in halves.
  static int64_t RowsAtOnce(int64_t rows) {
    if (rows == kMostRows || rows >= 2 * kMostRows) return kMostRows;
    const auto wanted = static_cast<uint64_t>(rows > kMostRows ? (rows + 1) / 2 : rows);
    return static_cast<int64_t>(std::bit_floor(wanted));
  }

  template <int kRows>
  static void Dispatch(const RowGemmArgs& args, int64_t rows, int64_t vectors) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return Dispatch<Below(kRows)>(args, rows, vectors);
    }
    constexpr int kVectors = VectorsFor(kRows);
    int64_t v = 0;
    for (; v + kVectors <= vectors; v += kVectors) Multiply<kRows, kVectors>(args, v);
    if constexpr (kVectors > 1) {
      for (; v < vectors; ++v) Multiply<kRows, 1>(args, v);
    }
  }

  template <int kRows, int kVectors>
  static void Multiply(const RowGemmArgs& args, int64_t first) {
    using Vec = typename Isa::Vec;
    Vec sums[kRows][kVectors];
    float* c = args.c + first * kTileRows;
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kVectors; ++n) {
        sums[r][n] =
            args.accumulate ? Isa::Load(c + r * args.c_stride + n * kTileRows) : Isa::Zero();
      }
    }
    const float* b = args.b + first * args.vector_stride;
    for (int64_t k = 0; k < args.depth; ++k, b += args.b_stride) {
      Vec row[kVectors];
      for (int n = 0; n < kVectors; ++n) row[n] = Isa::Load(b + n * args.vector_stride);
      for (int r = 0; r < kRows; ++r) {
        const Vec x = Isa::Broadcast(args.a[r * args.a_stride + k]);
        for (int n = 0; n < kVectors; ++n) sums[r][n] = Isa::Fma(x, row[n], sums[r][n]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kVectors; ++n) {
        Isa::Store(c + r * args.c_stride + n * kTileRows, sums[r][n]);
      }
    }
  }
};

}  // namespace cpumoe
