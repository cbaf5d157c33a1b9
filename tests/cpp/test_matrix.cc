#include "cpp/test_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ranges>
#include <stdexcept>
#include <type_traits>

#include "base/bits.h"
#include "cpp/all_formats.h"

namespace cpumoe {
namespace {

// One of `scales` as a scale of type Stored. If this type has smaller exponents, any number of it.
template <class Stored, class Scale>
Stored RandomScale(const std::vector<Scale>& scales, Rng& rng) {
  if constexpr (std::is_same_v<Stored, Fp16>) {
    return {static_cast<uint16_t>(rng() & 0xbfff)};  // without the exponent's highest bit
  } else {
    return ExactScale<Stored>(scales[rng() % scales.size()].ToFloat());
  }
}

// Fills a row with random codes that are numbers.
template <class F>
void FillCodes(std::byte* row, int64_t columns, Rng& rng, const Magnitudes& magnitudes) {
  if constexpr (HasScales<F>) {
    std::generate_n(row, columns * F::kCodeBits / 8, [&] { return static_cast<std::byte>(rng()); });
    if constexpr (F::kCodeBits == 8) {
      std::replace_if(
          row, row + columns,
          [](std::byte code) { return std::isnan(F::Decode(std::to_integer<uint32_t>(code))); },
          std::byte{0x42});
    }
  } else {
    static_assert(F::kCodeBits == 16);
    // Without the sign bit, codes are in the order of their values. Those that are no numbers
    // follow.
    const auto codes = std::views::iota(0u, 0x8000u);
    const uint32_t begin = *std::ranges::partition_point(
        codes, [&](uint32_t code) { return F::Decode(code) < magnitudes.least; });
    const uint32_t end = *std::ranges::partition_point(
        codes, [&](uint32_t code) { return F::Decode(code) <= magnitudes.greatest; });
    if (begin >= end) throw std::invalid_argument("the format has no code of such a magnitude");
    for (int64_t k = 0; k < columns; ++k) {
      const uint64_t random = rng();
      const auto code =
          static_cast<uint16_t>((random >> 63 << 15) | (begin + random % (end - begin)));
      std::memcpy(row + k * 2, &code, sizeof(code));
    }
  }
}

}  // namespace

TestMatrix::TestMatrix(const std::string& format, int64_t rows, int64_t columns, int64_t gap,
                       std::optional<ScaleGrid> grid)
    : rows_(rows), columns_(columns) {
  VisitFormat(format, [&]<class F>(F) {
    grid_ = grid.value_or(UsualGrid<F>());
    codes_stride_ = columns * F::kCodeBits / 8 + gap;
    // The last row has no gap behind it, so that a sanitizer notices reads beyond it.
    codes_.assign(rows * codes_stride_ - gap, kFiller);
    if constexpr (HasScales<F>) {
      const RawMatrix view = View();
      scales_stride_ = view.scale_columns() * view.template ScaleBytes<F>() + gap;
      scales_.assign(view.scale_rows() * scales_stride_ - gap, kFiller);
    }
  });
}

TestMatrix TestMatrix::Random(const std::string& format, int64_t rows, int64_t columns, Rng& rng,
                              const Magnitudes& magnitudes, int64_t gap,
                              std::optional<ScaleGrid> grid) {
  TestMatrix matrix(format, rows, columns, gap, grid);
  VisitFormat(format, [&]<class F>(F) {
    using Scale = typename F::Scale;
    std::vector<Scale> scales;
    if constexpr (HasScales<F>) {
      const Magnitudes wanted = magnitudes == kModerate ? ForCodes<F>(kModerate) : magnitudes;
      for (const Scale scale : ValidScales<F>()) {
        const float magnitude = std::fabs(scale.ToFloat());
        if (magnitude >= wanted.least && magnitude <= wanted.greatest) {
          scales.push_back(scale);
        }
      }
      if (scales.empty()) {
        throw std::invalid_argument("the format has no scale of such a magnitude");
      }
    }
    if constexpr (kHasFactorOf<F>) {
      matrix.factor_ = std::uniform_real_distribution<float>(0.5f, 2.0f)(rng);
    }
    const MutableRawMatrix view = matrix.MutableView();
    for (int64_t row = 0; row < rows; ++row) {
      FillCodes<F>(view.codes + row * view.codes_stride, columns, rng, magnitudes);
    }
    if constexpr (HasScales<F>) {
      VisitScaleType<Scale>(view.grid.type, [&]<class Stored>(Stored) {
        for (int64_t row = 0; row < view.scale_rows(); ++row) {
          std::byte* out = view.scales + row * view.scales_stride;
          for (int64_t i = 0; i < view.scale_columns(); ++i, out += sizeof(Stored)) {
            const auto stored = RandomScale<Stored>(scales, rng);
            std::memcpy(out, &stored, sizeof(stored));
          }
        }
      });
    }
  });
  return matrix;
}

}  // namespace cpumoe
