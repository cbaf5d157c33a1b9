// Packs checkpoint rows to tiles (kernels/tile.h), bit for bit. unpack-inl.h does the reverse.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "base/bits.h"
#include "base/check.h"
#include "formats/weight_format.h"
#include "kernels/tile.h"
#include "packing/raw_matrix.h"
#include "packing/scale_range.h"
#include "packing/tile_layout.h"
#include "packing/transpose.h"

namespace cpumoe {

// Moves the codes of a 32-bit word from checkpoint order (k ascending from the low bits) to the
// order of a lane, and back. Odd k of the low half-word change places with even k of the high
// half-word. Words is uint32_t or a vector of it.
template <int kCodeBits, class Words>
constexpr Words SwapEvenOdd(Words words) {
  uint32_t odd = 0;  // codes of odd k in the low half-word
  for (int bit = kCodeBits; bit < 16; bit += 2 * kCodeBits) odd |= ((1u << kCodeBits) - 1) << bit;
  constexpr int kDistance = 16 - kCodeBits;
  const Words moved = (words ^ (words >> kDistance)) & odd;
  return words ^ moved ^ (moved << kDistance);
}

template <WeightFormat F>
inline constexpr TileShape kTileShape = {.code_bits = F::kCodeBits,
                                         .packed_depth = kPackedDepthOf<F>,
                                         .scale_bytes = kBytesOfScale<PackedScaleOf<F>>};

// Packs the tiles of a matrix.
template <WeightFormat F>
class PackedLayout : public TileLayout {
 public:
  using Geometry = TileGeometry<F::kCodeBits>;
  using Scale = typename F::Scale;
  using PackedScale = PackedScaleOf<F>;
  static constexpr int64_t kScaleBytes = kBytesOfScale<PackedScale>;
  using ScaleWord = std::conditional_t<kScaleBytes == 1, uint8_t,
                                       std::conditional_t<kScaleBytes == 2, uint16_t, uint32_t>>;
  static_assert(!HasScales<F> || sizeof(ScaleWord) == kScaleBytes);

  // `layout` has kTileShape<F>.
  explicit PackedLayout(const TileLayout& layout) : TileLayout(layout) {}
  PackedLayout(int64_t rows, int64_t columns) : TileLayout(kTileShape<F>, rows, columns) {
    RequireWholeBytes<F>(columns, "columns");
  }

  // Packs rows [16 * tile, 16 * tile + 16) of `source`. For a scale that the format forbids, or a
  // code that is NaN or infinite, throws std::invalid_argument with its place.
  ScaleRange PackTile(const RawMatrix& source, int64_t tile, std::byte* packed) const {
    const TileView view = Tile(packed, tile);
    ScaleRange range;
    if constexpr (HasScales<F>) {
      range = PackScales(source, tile, const_cast<std::byte*>(view.scales));
    }
    const std::byte* codes[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      codes[r] = source.codes + RowOf(tile, r) * source.codes_stride;
      if constexpr (requires { F::kNotFinite; }) RequireFinite(source, RowOf(tile, r));
    }
    std::byte* out = const_cast<std::byte*>(view.codes);
    RowsToLanes<uint32_t>(codes, filled_groups() * Geometry::kGroupVectors, out, kSwap);
    if (filled_groups() < groups()) {
      PackLastGroup(codes, out + filled_groups() * Geometry::kGroupBytes);
    }
    return range;
  }

 private:
  // The row of the matrix in row r of a tile.
  int64_t RowOf(int64_t tile, int r) const { return std::min(tile * kTileRows + r, rows() - 1); }

  // Groups that rows fill.
  int64_t filled_groups() const { return columns() / kGroupSize; }

  // Packs the last group, which rows do not fill.
  void PackLastGroup(const std::byte* const (&codes)[kTileRows], std::byte* out) const {
    constexpr int64_t kRowBytes = kGroupSize * F::kCodeBits / 8;
    constexpr uint32_t kZero = ZeroCodeOf<F>();
    constexpr auto kZeros = static_cast<std::byte>(F::kCodeBits == 4 ? kZero * 0x11 : kZero);
    static_assert(F::kCodeBits <= 8 || kZero == 0);
    const int64_t begin = filled_groups() * kRowBytes;
    const int64_t count = columns() * F::kCodeBits / 8 - begin;
    std::byte rows[kTileRows][kRowBytes];
    const std::byte* filled[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(rows[r], codes[r] + begin, count);
      std::fill(rows[r] + count, rows[r] + kRowBytes, kZeros);
      filled[r] = rows[r];
    }
    RowsToLanes<uint32_t>(filled, Geometry::kGroupVectors, out, kSwap);
  }

  // Packs one scale per row and run of kPackedDepthOf k, as PackedScale. Runs that share a stored
  // scale get a copy each, so that kernels are the same for any grid.
  ScaleRange PackScales(const RawMatrix& source, int64_t tile, std::byte* out) const {
    return VisitScaleType<Scale>(source.grid.type, [&]<class Stored>(Stored) {
      constexpr bool kConverts = !std::is_same_v<Stored, PackedScale>;
      const std::byte* scales[kTileRows];
      ScaleRange range;
      for (int r = 0; r < kTileRows; ++r) {
        scales[r] = source.ScalesOf(RowOf(tile, r));
        range.Merge(RangeOfRow<Stored>(source, RowOf(tile, r)));
      }
      std::vector<PackedScale> copies;
      const int64_t last = source.scale_columns() - 1;
      if (kConverts || source.grid.depth != kPackedDepthOf<F> || last + 1 < runs()) {
        copies.resize(kTileRows * runs());
        for (int r = 0; r < kTileRows; ++r) {
          PackedScale* row = &copies[r * runs()];
          for (int64_t run = 0; run < runs(); ++run) {
            const int64_t at = std::min(run * kPackedDepthOf<F> / source.grid.depth, last);
            row[run] = Converted<PackedScale, Stored>(scales[r] + at * sizeof(Stored));
          }
          scales[r] = reinterpret_cast<const std::byte*>(row);
        }
      }
      RowsToLanes<ScaleWord>(scales, runs(), out, [](auto words) { return words; });
      return range;
    });
  }

  // Converts a stored scale to the format's type or to the packed one.
  template <class To, class Stored>
  static To Converted(const std::byte* stored) {
    if constexpr (std::is_same_v<Stored, To>) {
      return LoadScale<To>(stored);
    } else if constexpr (std::is_same_v<Stored, Scale> || std::is_same_v<To, Fp32>) {
      return ExactScale<To>(LoadScale<Stored>(stored).ToFloat());
    } else {
      throw std::logic_error("AllowsScaleType must refuse this type");
    }
  }

  // Throws std::invalid_argument if a code of the row is NaN or infinite.
  void RequireFinite(const RawMatrix& source, int64_t row) const {
    using Code = std::conditional_t<F::kCodeBits == 8, uint8_t, uint16_t>;
    static_assert(F::kCodeBits == 8 * sizeof(Code));
    constexpr Code kMagnitude = std::numeric_limits<Code>::max() / 2;
    const std::byte* codes = source.codes + row * source.codes_stride;
    const auto code_at = [codes](int64_t k) {
      Code code;
      std::memcpy(&code, codes + k * sizeof(Code), sizeof(code));
      return code;
    };
    Code greatest = 0;  // not a bool, so that compilers vectorise the loop
    for (int64_t k = 0; k < columns(); ++k) {
      greatest = std::max<Code>(greatest, code_at(k) & kMagnitude);
    }
    if (greatest < F::kNotFinite) return;
    int64_t k = 0;
    while ((code_at(k) & kMagnitude) < F::kNotFinite) ++k;
    const float weight = F::Decode(code_at(k));
    throw std::invalid_argument(Message(source.name, ": weight [", row, ", ", k, "] is ",
                                        std::isnan(weight) ? "nan"
                                        : weight < 0       ? "-inf"
                                                           : "inf",
                                        "; ", F::kName,
                                        " weights must be finite: the checkpoint is damaged"));
  }

  static constexpr auto kSwap = [](auto words) { return SwapEvenOdd<F::kCodeBits>(words); };

  template <class Stored>
  ScaleRange RangeOfRow(const RawMatrix& source, int64_t row) const {
    const std::byte* in = source.ScalesOf(row);
    // Not a bool, because compilers vectorise the loop only if all words have one size.
    uint32_t invalid = 0;
    // Magnitudes of floats are in the order of their bits.
    uint32_t least = ~0u, greatest = 0;
    for (int64_t g = 0; g < source.scale_columns(); ++g) {
      const auto scale = Converted<Scale, Stored>(in + g * sizeof(Stored));
      const uint32_t magnitude = std::bit_cast<uint32_t>(scale.ToFloat()) & 0x7fffffffu;
      invalid |= F::IsValidScale(scale) ? 0u : 1u;
      least = std::min(least, magnitude);
      greatest = std::max(greatest, magnitude);
    }
    if (invalid != 0) ThrowInvalidScale<Stored>(source, row);
    const ScaleRange range{std::bit_cast<float>(least), std::bit_cast<float>(greatest)};
    return range.IsUsual() ? range : RangeOfNonZeroGroups<Stored>(source, row);
  }

  // The range without groups of zeros, which are zero with any scale. Checkpoints have the least
  // scale there.
  template <class Stored>
  ScaleRange RangeOfNonZeroGroups(const RawMatrix& source, int64_t row) const {
    ScaleRange range;
    for (int64_t g = 0; g < source.scale_columns(); ++g) {
      if (IsZero(source, row, g)) continue;
      const auto scale = Converted<Scale, Stored>(source.ScalesOf(row) + g * sizeof(Stored));
      const float magnitude = std::abs(scale.ToFloat());
      range.Merge({magnitude, magnitude});
    }
    return range;
  }

  // Whether all codes of group `g` of a row are zeros.
  static bool IsZero(const RawMatrix& source, int64_t row, int64_t g) {
    constexpr int64_t kCodesPerByte = 8 / F::kCodeBits;
    const std::byte* codes = source.codes + row * source.codes_stride;
    const int64_t begin = g * source.grid.depth / kCodesPerByte;
    const int64_t end = std::min((g + 1) * source.grid.depth, source.columns) / kCodesPerByte;
    return std::all_of(codes + begin, codes + end, [](std::byte byte) {
      for (int bit = 0; bit < 8; bit += F::kCodeBits) {
        const uint32_t code = (std::to_integer<uint32_t>(byte) >> bit) & ((1u << F::kCodeBits) - 1);
        if (F::Decode(code) != 0.0f) return false;
      }
      return true;
    });
  }

  template <class Stored>
  [[noreturn]] void ThrowInvalidScale(const RawMatrix& source, int64_t row) const {
    const std::byte* in = source.ScalesOf(row);
    for (int64_t g = 0;; ++g) {
      const auto scale = Converted<Scale, Stored>(in + g * sizeof(Stored));
      if (F::IsValidScale(scale)) continue;
      throw std::invalid_argument(Message(source.name, ": scale [", row / source.grid.rows, ", ", g,
                                          "] is ", scale.ToFloat(), "; ", F::kName,
                                          std::isfinite(scale.ToFloat())
                                              ? " scales must not be negative"
                                              : " scales must be finite",
                                          ": the checkpoint is damaged"));
    }
  }
};

}  // namespace cpumoe
