// A weight matrix in the memory and layout of its checkpoint: rows of codes and rows of group
// scales.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bits.h"
#include "base/check.h"
#include "base/float_types.h"
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
  int64_t codes_stride = 0;  // bytes from one row to the next
  Byte* scales = nullptr;    // null if the format has none
  int64_t scales_stride = 0;
  int64_t scale_depth = kGroupSize;  // successive k that share a scale
  const char* name = "weight";       // for error messages
  // Whether the scales are bf16 numbers instead of the format's own type. Destinations only.
  bool scales_as_bf16 = false;

  // Scales of a row.
  int64_t scale_columns() const { return CeilDiv(columns, scale_depth); }

  template <class Format>
  int64_t ScaleBytes() const {
    return scales_as_bf16 ? int64_t{sizeof(Bf16)} : kBytesOfScale<typename Format::Scale>;
  }

  // Throws std::invalid_argument unless the matrix has the scales that the format needs.
  template <class Format>
  void RequireScales() const {
    if constexpr (HasScales<Format>) {
      Require(scales != nullptr || rows == 0 || columns == 0, name, ": ", Format::kName,
              " needs scales, got none");
      Require(Format::AllowsScaleDepth(scale_depth), name, ": ", Format::kName,
              " has no groups of ", scale_depth, " weights that share a scale");
    } else {
      Require(scales == nullptr, name, ": ", Format::kName, " has no scales, got some");
    }
  }

  void RequireShape(int64_t wanted_rows, int64_t wanted_columns) const {
    Require(rows == wanted_rows && columns == wanted_columns, name, ": expected [", wanted_rows,
            ", ", wanted_columns, "] weights, got [", rows, ", ", columns, "]");
  }

  // Returns rows [begin, begin + count), which are a shard of the gate or up projection.
  RawMatrixOf Rows(int64_t begin, int64_t count) const {
    Require(begin >= 0 && count >= 0 && begin + count <= rows, name, ": rows [", begin, ", ",
            begin + count, ") are not within the matrix's ", rows);
    RawMatrixOf shard = *this;
    shard.rows = count;
    shard.codes += begin * codes_stride;
    shard.scales += begin * scales_stride;
    return shard;
  }

  // Returns columns [begin, begin + count), which must be whole groups. They are a shard of the
  // down projection.
  template <class Format>
  RawMatrixOf Columns(int64_t begin, int64_t count) const {
    Require(begin >= 0 && count >= 0 && begin + count <= columns, name, ": columns [", begin, ", ",
            begin + count, ") are not within the matrix's ", columns);
    Require(begin % scale_depth == 0 && (count % scale_depth == 0 || begin + count == columns),
            name, ": a slice of columns must consist of whole groups of ", scale_depth, ", got [",
            begin, ", ", begin + count, ")");
    RawMatrixOf shard = *this;
    shard.columns = count;
    shard.codes += begin * Format::kCodeBits / 8;
    shard.scales += begin / scale_depth * ScaleBytes<Format>();
    return shard;
  }
};

using RawMatrix = RawMatrixOf<const std::byte>;
using MutableRawMatrix = RawMatrixOf<std::byte>;

}  // namespace cpumoe
