// The places of a matrix's tiles in memory (kernels/tile.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bits.h"
#include "kernels/tile.h"

namespace cpumoe {

// What the bytes of a tile depend on, besides the size of its matrix.
struct TileShape {
  int code_bits;
  int packed_depth;  // successive k whose packed scale is one
  int scale_bytes;   // of a packed scale; 0: there are none
};

// The places of the tiles of an [rows, columns] matrix. The missing rows of the last tile repeat
// the matrix's last row, so that results for them are finite. These results are ignored. Missing
// columns of the last group are codes of zero, with the row's last scale.
class TileLayout {
 public:
  // `interleaved` matrices of this shape take turns in memory, one tile of each.
  TileLayout(const TileShape& shape, int64_t rows, int64_t columns, int interleaved = 1)
      : rows_(rows),
        columns_(columns),
        runs_(CeilDiv(PaddedColumns(columns), int64_t{shape.packed_depth})),
        code_bytes_(PaddedColumns(columns) * shape.code_bits / 8 * kTileRows),
        tile_bytes_(RoundUp(code_bytes_ + runs_ * kTileRows * shape.scale_bytes, kVectorBytes)),
        distance_(interleaved * tile_bytes_) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t groups() const { return GroupsOf(columns_); }
  int64_t tiles() const { return CeilDiv(rows_, int64_t{kTileRows}); }
  // Packed scales of a row.
  int64_t runs() const { return runs_; }
  // The bytes of one matrix.
  int64_t bytes() const { return tiles() * tile_bytes_; }
  int64_t TileBytes() const { return tile_bytes_; }

  // The address that tile 0 would have, if tile `tile` is at `address`. A buffer that has only the
  // tiles from `tile` on is thus addressed like a whole matrix.
  std::byte* Origin(std::byte* address, int64_t tile) const {
    return reinterpret_cast<std::byte*>(reinterpret_cast<uintptr_t>(address) -
                                        static_cast<uintptr_t>(tile * distance_));
  }

  TileView Tile(const std::byte* packed, int64_t tile) const {
    const std::byte* codes = packed + tile * distance_;
    return {codes, codes + code_bytes_};
  }

 private:
  int64_t rows_;
  int64_t columns_;
  int64_t runs_;
  int64_t code_bytes_;  // of a tile
  int64_t tile_bytes_;
  int64_t distance_;  // between successive tiles of one matrix, in bytes
};

}  // namespace cpumoe
