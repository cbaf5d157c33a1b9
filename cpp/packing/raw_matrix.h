// A weight matrix in the memory and layout of its checkpoint: rows of codes and rows of scales.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "base/bits.h"
#include "base/check.h"
#include "base/float_types.h"
#include "formats/scale_grid.h"
#include "formats/weight_format.h"
#include "kernels/tile.h"

namespace cpumoe {

// Byte is `const std::byte` for a source and `std::byte` for a destination. Within a row, bytes are
// dense. Rows may be any distance apart, so interleaved gate/up rows are two matrices with twice
// the stride.
template <class Byte>
struct RawMatrixOf {
  int64_t rows = 0;     // N, output features
  int64_t columns = 0;  // K, input features
  Byte* codes = nullptr;
  int64_t codes_stride = 0;     // bytes from one row to the next
  Byte* scales = nullptr;       // null if the format has none
  int64_t scales_stride = 0;    // bytes from one row of scales to the next
  ScaleGrid grid = {};          // which weights share a scale
  const char* name = "weight";  // for error messages
  float factor = 1.0f;          // multiplies all weights, in formats that have factors

  // Scales [scale_rows, scale_columns].
  int64_t scale_rows() const { return CeilDiv(rows, grid.rows); }
  int64_t scale_columns() const { return CeilDiv(columns, grid.depth); }

  // Bytes of one scale.
  template <class Format>
  int64_t ScaleBytes() const {
    return VisitScaleType<typename Format::Scale>(
        grid.type, []<class Scale>(Scale) { return kBytesOfScale<Scale>; });
  }

  // The first of the scales that belong to a row.
  Byte* ScalesOf(int64_t row) const { return scales + row / grid.rows * scales_stride; }

  // Throws std::invalid_argument unless the matrix has the scales and the factor that the format
  // needs.
  template <class Format>
  void RequireScales() const {
    Require(kHasFactorOf<Format> ? std::isfinite(factor) : factor == 1.0f, name, ": ",
            Format::kName, kHasFactorOf<Format> ? " needs a finite factor" : " has no factor",
            ", got ", factor);
    if constexpr (HasScales<Format>) {
      Require(scales != nullptr || rows == 0 || columns == 0, name, ": ", Format::kName,
              " needs scales, got none");
      Require(AllowsScaleDepth<Format>(grid.depth, columns), name, ": ", Format::kName,
              " has no groups of ", grid.depth, " weights that share a scale");
      Require(AllowsScaleRows<Format>(grid.rows), name, ": ", Format::kName, " has no blocks of ",
              grid.rows, " rows that share their scales");
      if (!AllowsScaleType<Format>(grid.type)) {
        throw std::invalid_argument(
            Message(name, ": expected ", ScaleTypeNames(ScaleTypesOf<Format>()),
                    " scales, for which the layer of ", Format::kName, " was made, got ",
                    ScaleTypeName(grid.type), " scales"));
      }
    } else {
      Require(scales == nullptr, name, ": ", Format::kName, " has no scales, got some");
    }
  }

  void RequireShape(int64_t wanted_rows, int64_t wanted_columns) const {
    Require(rows == wanted_rows && columns == wanted_columns, name, ": expected [", wanted_rows,
            ", ", wanted_columns, "] weights, got [", rows, ", ", columns, "]");
  }

  // Returns rows [begin, begin + count), which are a shard of the gate or up projection. They must
  // begin with a block of rows that share their scales, or lie within one.
  RawMatrixOf Rows(int64_t begin, int64_t count) const {
    Require(begin >= 0 && count >= 0 && begin + count <= rows, name, ": rows [", begin, ", ",
            begin + count, ") are not within the matrix's ", rows);
    Require(begin % grid.rows == 0 || begin / grid.rows == (begin + count - 1) / grid.rows, name,
            ": a slice of rows must begin with a block of ", grid.rows,
            " rows that share their scales, got [", begin, ", ", begin + count, ")");
    RawMatrixOf shard = *this;
    shard.rows = count;
    shard.codes += begin * codes_stride;
    shard.scales = scales == nullptr ? nullptr : ScalesOf(begin);
    return shard;
  }

  // Returns columns [begin, begin + count), which are a shard of the down projection. They must be
  // whole groups, except at the end of the matrix, and begin with a scale or lie within one.
  template <class Format>
  RawMatrixOf Columns(int64_t begin, int64_t count) const {
    Require(begin >= 0 && count >= 0 && begin + count <= columns, name, ": columns [", begin, ", ",
            begin + count, ") are not within the matrix's ", columns);
    Require(begin % kGroupSize == 0 && (count % kGroupSize == 0 || begin + count == columns), name,
            ": a slice of columns must consist of whole groups of ", kGroupSize, ", got [", begin,
            ", ", begin + count, ") of ", columns);
    RawMatrixOf shard = *this;
    shard.columns = count;
    shard.codes += begin * Format::kCodeBits / 8;
    if (scales == nullptr) return shard;
    Require(begin % grid.depth == 0 || begin / grid.depth == (begin + count - 1) / grid.depth, name,
            ": a slice of columns must begin with one of the ", grid.depth,
            " weights that share a scale, got [", begin, ", ", begin + count, ")");
    if (count > 0) shard.grid.depth = std::min(grid.depth, count);
    shard.scales += begin / grid.depth * ScaleBytes<Format>();
    return shard;
  }
};

using RawMatrix = RawMatrixOf<const std::byte>;
using MutableRawMatrix = RawMatrixOf<std::byte>;

}  // namespace cpumoe
