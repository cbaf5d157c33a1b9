// How tiles of a weight format are packed and unpacked, for code that is compiled once for all
// formats. A variant library has one TileFormat per format (tile_format-inl.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/scale_grid.h"
#include "formats/weight_format.h"
#include "kernels/tile.h"
#include "packing/raw_matrix.h"
#include "packing/scale_range.h"
#include "packing/tile_layout.h"

namespace cpumoe {

struct TileFormat {
  const char* name;  // the format's kName
  TileShape shape;
  bool has_factor;       // whether a matrix may have a factor
  ScaleType scale_type;  // the format's own; kOwn: there are no scales

  // Throws std::invalid_argument unless a matrix to pack has the scales that the format needs.
  void (*require_scales)(const RawMatrix& source);
  // PackedLayout::PackTile.
  ScaleRange (*pack)(const TileLayout& layout, const RawMatrix& source, int64_t tile,
                     std::byte* packed);
  // RequireHoldsScales (unpack-inl.h).
  void (*require_holds_scales)(const MutableRawMatrix& out, int64_t row, int64_t column,
                               const ScaleGrid& stored);
  // TileUnpacker::Unpack.
  void (*unpack)(const TileView& view, int64_t tile, int64_t matrix_rows, int64_t row_begin,
                 int64_t column_begin, const MutableRawMatrix& out);
  // Ends a thread's calls of `unpack`: other threads and devices are then sure to see its results.
  void (*finish_unpacking)();

  void RequireWholeBytes(int64_t codes, const char* what) const {
    cpumoe::RequireWholeBytes(name, shape.code_bits, codes, what);
  }
  // What the weights of a stored matrix have besides codes. The type of the grid is not kOwn.
  StoredScales ScalesOf(const RawMatrix& source) const {
    StoredScales stored = {source.grid, source.factor};
    if (stored.grid.type == ScaleType::kOwn) stored.grid.type = scale_type;
    return stored;
  }
  // What multiplies all weights of a matrix that had these scales.
  float FactorOf(const StoredScales& stored) const { return has_factor ? stored.factor : 1.0f; }
};

}  // namespace cpumoe
