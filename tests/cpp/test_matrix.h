// Random weight matrices in the form in which a checkpoint stores them, in any format.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "formats/scale_grid.h"
#include "formats/weight_format.h"
#include "kernels/tile.h"
#include "packing/raw_matrix.h"

namespace cpumoe {

using Rng = std::mt19937_64;

// The least and the greatest magnitude of a matrix's scales.
struct Magnitudes {
  float least = 0.0f;
  float greatest = std::numeric_limits<float>::max();

  bool operator==(const Magnitudes&) const = default;
};
inline constexpr Magnitudes kModerate = {0x1p-7f, 0x1p-3f};

// Magnitudes with which a format's weights have those that four-bit weights have with `scales`.
template <class F>
constexpr Magnitudes ForCodes(const Magnitudes& scales) {
  if constexpr (HasScales<F> && F::kCodeBits > 4) {
    return {scales.least * (8 / F::kMaxMagnitude), scales.greatest * (8 / F::kMaxMagnitude)};
  }
  return scales;
}

// The grid of a format's scales in most tests: one row and the usual number of successive k.
template <class F>
constexpr ScaleGrid UsualGrid() {
  if constexpr (HasScales<F>) return {.depth = F::kScaleDepth};
  return {.depth = kGroupSize};
}

// Columns that every slice of a format's matrices must be a multiple of.
template <class F>
constexpr int64_t ColumnUnit() {
  return std::max<int64_t>(UsualGrid<F>().depth, kGroupSize);
}

// ValidScales of a format with scales.
template <ScaledFormat F>
std::vector<typename F::Scale> ValidScalesOf() {
  using Scale = typename F::Scale;
  constexpr int kBits = 8 * std::min<int>(sizeof(Scale), 2);
  std::vector<Scale> scales;
  for (uint32_t bits = 0; bits < (1u << kBits); ++bits) {
    const uint32_t mantissa = bits & 0x7f, exponent = (bits >> 7) & 0xff;
    const bool notable = exponent <= 1 || exponent == 127 || exponent >= 254;
    const bool taken = kBits == 8 || mantissa == (exponent * 37 & 0x7f) ||
                       (notable && (mantissa <= 1 || mantissa >= 0x7e));
    const Scale scale = [&]() -> Scale {
      if constexpr (std::is_same_v<Scale, Fp32>) {
        return {std::bit_cast<float>(bits << 16 | (bits * 40503u & 0xffffu))};
      } else {
        return {static_cast<decltype(Scale::bits)>(bits)};
      }
    }();
    if (taken && F::IsValidScale(scale)) scales.push_back(scale);
  }
  return scales;
}

// Returns all scales that a format allows, if scales have 8 bits. Otherwise it returns some 500:
// one mantissa for each sign and exponent, and also the extreme upper bits of mantissas for the
// extreme and middle exponents. Without scales it returns one NoScale.
template <class F>
std::vector<typename F::Scale> ValidScales() {
  if constexpr (!HasScales<F>) {
    return {NoScale{}};
  } else {
    return ValidScalesOf<F>();
  }
}

// Makes all codes zeros. Scales stay.
template <class F>
void SetToZeros(const MutableRawMatrix& matrix) {
  int code = 0;
  while (F::Decode(code) != 0.0f) ++code;
  const int byte = F::kCodeBits == 4 ? code * 0x11 : code;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    std::memset(matrix.codes + row * matrix.codes_stride, byte, matrix.columns * F::kCodeBits / 8);
  }
}

// About `columns`, an even number, that a format can have: one less if a code has whole bytes.
template <class F>
constexpr int64_t OddIfPossible(int64_t columns) {
  return columns - (F::kCodeBits < 8 ? 0 : 1);
}

// A matrix that owns its bytes. Rows of codes and of scales can be further apart than they are
// long, as rows of interleaved matrices are. A pattern fills the bytes between rows.
class TestMatrix {
 public:
  static constexpr std::byte kFiller{0xee};

  // Without `grid`, scales have the format's UsualGrid.
  TestMatrix(const std::string& format, int64_t rows, int64_t columns, int64_t gap = 0,
             std::optional<ScaleGrid> grid = {});

  // Makes random codes and random valid scales of these magnitudes (kModerate: ForCodes). Without
  // scales the weights have these magnitudes. Makes a random factor if the format has factors.
  static TestMatrix Random(const std::string& format, int64_t rows, int64_t columns, Rng& rng,
                           const Magnitudes& scales = kModerate, int64_t gap = 0,
                           std::optional<ScaleGrid> grid = {});

  RawMatrix View() const { return View<const std::byte>(codes_.data(), scales_.data()); }
  MutableRawMatrix MutableView() { return View<std::byte>(codes_.data(), scales_.data()); }
  bool operator==(const TestMatrix& other) const {
    return codes_ == other.codes_ && scales_ == other.scales_;
  }

 private:
  template <class Byte>
  RawMatrixOf<Byte> View(Byte* codes, Byte* scales) const {
    return {.rows = rows_,
            .columns = columns_,
            .codes = codes,
            .codes_stride = codes_stride_,
            .scales = scales_stride_ == 0 ? nullptr : scales,
            .scales_stride = scales_stride_,
            .grid = grid_,
            .name = "test.weight",
            .factor = factor_};
  }

  int64_t rows_, columns_;
  ScaleGrid grid_;
  float factor_ = 1.0f;
  int64_t codes_stride_, scales_stride_ = 0;
  std::vector<std::byte> codes_;
  std::vector<std::byte> scales_;
};

}  // namespace cpumoe
