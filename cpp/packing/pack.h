// Checkpoint rows to packed tiles (kernels/tile.h) and back, bit for bit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/bits.h"
#include "base/check.h"
#include "formats/weight_format.h"
#include "kernels/tile.h"
#include "packing/raw_matrix.h"

namespace cpumoe {

// Moves the codes of a 32-bit word from checkpoint order (k ascending from the low bits) to a
// lane's order, and back: odd k of the low half-word change places with even k of the high one.
template <int kCodeBits>
constexpr uint32_t SwapEvenOdd(uint32_t word) {
  uint32_t odd = 0;  // codes of odd k in the low half-word
  for (int bit = kCodeBits; bit < 16; bit += 2 * kCodeBits) odd |= ((1u << kCodeBits) - 1) << bit;
  constexpr int kDistance = 16 - kCodeBits;
  const uint32_t moved = (word ^ (word >> kDistance)) & odd;
  return word ^ moved ^ (moved << kDistance);
}

// Least and greatest scale of a matrix; decides whether scales fold into the multiplicands exactly.
struct ScaleRange {
  float least = std::numeric_limits<float>::infinity();
  float greatest = 0.0f;

  void Merge(const ScaleRange& other) {
    least = std::min(least, other.least);
    greatest = std::max(greatest, other.greatest);
  }
};

// Where the tiles of an [rows, columns] matrix lie. The last tile's missing rows repeat the last
// row, so that whatever a kernel computes for them is finite and ignored.
template <WeightFormat F>
class PackedLayout {
 public:
  using Geometry = TileGeometry<F::kCodeBits, F::kGroupSize>;
  using Scale = typename F::Scale;

  PackedLayout(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), groups_(columns / F::kGroupSize) {
    Require(columns % F::kGroupSize == 0, F::kName, ": columns must be a multiple of ",
            F::kGroupSize, ", got ", columns);
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t groups() const { return groups_; }
  int64_t tiles() const { return CeilDiv(rows_, kTileRows); }
  int64_t bytes() const { return tiles() * TileBytes(); }

  TileView Tile(const std::byte* packed, int64_t tile) const {
    const std::byte* codes = packed + tile * TileBytes();
    return {codes, codes + groups_ * Geometry::kGroupBytes};
  }

  // Packs rows [16 * tile, 16 * tile + 16) of `source`. Throws std::invalid_argument, with the
  // place, for a scale that the format forbids.
  ScaleRange PackTile(const RawMatrix& source, int64_t tile, std::byte* packed) const {
    const TileView view = Tile(packed, tile);
    auto* lanes = const_cast<std::byte*>(view.codes);
    auto* scales = reinterpret_cast<Scale*>(const_cast<std::byte*>(view.scales));
    ScaleRange range;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = std::min(tile * kTileRows + r, rows_ - 1);
      PackScales(source, row, scales + r, range);
    }
    for (int64_t chunk = 0; chunk < Vectors(); chunk += kChunkVectors) {
      const int64_t end = std::min(chunk + kChunkVectors, Vectors());
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = std::min(tile * kTileRows + r, rows_ - 1);
        const std::byte* in = source.codes + row * source.codes_stride;
        for (int64_t v = chunk; v < end; ++v) {
          uint32_t word;
          std::memcpy(&word, in + v * 4, 4);
          word = SwapEvenOdd<F::kCodeBits>(word);
          std::memcpy(lanes + v * kVectorBytes + r * 4, &word, 4);
        }
      }
    }
    return range;
  }

  // Writes the tile's part of rows [row_begin, row_begin + out.rows) and columns
  // [column_begin, column_begin + out.columns) of the matrix to `out`; columns are whole groups.
  void UnpackTile(const std::byte* packed, int64_t tile, int64_t row_begin, int64_t column_begin,
                  const MutableRawMatrix& out) const {
    const TileView view = Tile(packed, tile);
    const int64_t first = std::max(tile * kTileRows, row_begin);
    const int64_t last = std::min({(tile + 1) * kTileRows, row_begin + out.rows, rows_});
    const int64_t group_begin = column_begin / F::kGroupSize;
    const int64_t groups = out.columns / F::kGroupSize;
    for (int64_t row = first; row < last; ++row) {
      const int64_t r = row - tile * kTileRows;
      std::byte* codes = out.codes + (row - row_begin) * out.codes_stride;
      std::byte* scales = out.scales + (row - row_begin) * out.scales_stride;
      const std::byte* in = view.codes + group_begin * Geometry::kGroupBytes + r * 4;
      for (int64_t v = 0; v < groups * Geometry::kGroupVectors; ++v) {
        uint32_t word;
        std::memcpy(&word, in + v * kVectorBytes, 4);
        word = SwapEvenOdd<F::kCodeBits>(word);
        std::memcpy(codes + v * 4, &word, 4);
      }
      const auto* packed_scales = reinterpret_cast<const Scale*>(view.scales);
      for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(scales + g * sizeof(Scale), packed_scales + (group_begin + g) * kTileRows + r,
                    sizeof(Scale));
      }
    }
  }

 private:
  static constexpr int64_t kChunkVectors = 16;  // a cache line of each row at a time

  int64_t Vectors() const { return groups_ * Geometry::kGroupVectors; }
  int64_t TileBytes() const {
    const int64_t scales = groups_ * kTileRows * static_cast<int64_t>(sizeof(Scale));
    return RoundUp(groups_ * Geometry::kGroupBytes + scales, kVectorBytes);
  }

  void PackScales(const RawMatrix& source, int64_t row, Scale* out, ScaleRange& range) const {
    const std::byte* in = source.scales + row * source.scales_stride;
    for (int64_t g = 0; g < groups_; ++g) {
      Scale scale;
      std::memcpy(&scale, in + g * sizeof(Scale), sizeof(Scale));
      if (!F::IsValidScale(scale)) {
        throw std::invalid_argument(Message(source.name, ": scale [", row, ", ", g, "] is ",
                                            scale.ToFloat(), "; ", F::kName,
                                            " scales must be finite: the checkpoint is damaged"));
      }
      const float magnitude = scale.ToFloat() < 0 ? -scale.ToFloat() : scale.ToFloat();
      range.least = std::min(range.least, magnitude);
      range.greatest = std::max(range.greatest, magnitude);
      out[g * kTileRows] = scale;
    }
  }

  int64_t rows_;
  int64_t columns_;
  int64_t groups_;
};

}  // namespace cpumoe
