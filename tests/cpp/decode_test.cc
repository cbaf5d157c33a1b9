// Every code decodes bit-exactly with every scale, on every path of every ISA.
//
// The test uses tiles of one group and 16 rows. For each scale, the tiles hold every byte value
// once, or every code that is longer than a byte. Multiplying with one-hot activations gives each
// weight alone, which must be code * scale in fp32.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/isa_test.h"
#include "cpp/test_matrix.h"
#include "packing/pack.h"

namespace cpumoe {
namespace {

using kernel_probe::Path;

class DecodeTest : public IsaFormatTest {
 protected:
  // Returns all tiles with scale number `index`. The place of byte b in the checkpoint's codes
  // depends on the scale, so that in the course of the test each byte value takes many places.
  template <class F>
  static TestMatrix AllCodes(typename F::Scale scale, size_t index) {
    constexpr int64_t kUnitBytes = std::max(F::kCodeBits / 8, 1);
    constexpr int64_t kRowUnits = kGroupSize * F::kCodeBits / 8 / kUnitBytes;
    constexpr int64_t kValues = int64_t{1} << 8 * kUnitBytes;
    TestMatrix matrix(RowOf<F>(), RoundUp(kValues / kRowUnits, kTileRows), kGroupSize);
    const MutableRawMatrix view = matrix.MutableView();
    for (int64_t row = 0; row < view.rows; ++row) {
      for (int64_t i = 0; i < kRowUnits; ++i) {
        auto unit = static_cast<uint32_t>((row * kRowUnits + i + index * 37) % kValues);
        // Codes that are no numbers would spoil the sums of their rows.
        if (F::kCodeBits >= 8 && !std::isfinite(F::Decode(unit))) unit = 0;
        std::memcpy(view.codes + row * view.codes_stride + i * kUnitBytes, &unit, kUnitBytes);
      }
      if constexpr (HasScales<F>) {
        for (int64_t i = 0; i < view.scale_columns(); ++i) {
          std::memcpy(view.scales + row * view.scales_stride + i * sizeof(scale), &scale,
                      sizeof(scale));
        }
      }
    }
    return matrix;
  }

  // Returns code times scale, rounded once. Sums start from +0, so a zero is positive. Where
  // activations are bf16, subnormal products of a format without scales count as zero.
  template <class F>
  float Expected(const RawMatrix& m, int64_t row, int64_t k, float scale) const {
    uint32_t word;
    std::memcpy(&word, m.codes + row * m.codes_stride + k * F::kCodeBits / 32 * 4, 4);
    const int shift = static_cast<int>(k * F::kCodeBits % 32);
    const uint32_t code = (word >> shift) & ((uint64_t{1} << F::kCodeBits) - 1);
    const float weight = F::Decode(code) * scale + 0.0f;
    const bool flushed = !HasScales<F> && kernels().activation_bits == 8;
    return flushed && std::fabs(weight) < std::numeric_limits<float>::min() ? 0.0f : weight;
  }

  // The scale of a row of one group.
  template <class F>
  static float ScaleOf(const RawMatrix& m, int64_t row) {
    if constexpr (HasScales<F>) {
      return VisitScaleType<typename F::Scale>(m.grid.type, [&]<class Stored>(Stored) {
        return LoadScale<Stored>(m.ScalesOf(row)).ToFloat();
      });
    }
    return 1.0f;
  }

  // Runs `path` over the matrix with one-hot tokens for k = 0, 1, ..., `batch` tokens at once.
  template <class F>
  void CheckPath(Path path, int64_t batch, const TestMatrix& matrix) {
    const RawMatrix view = matrix.View();
    const PackedLayout<F> layout(view.rows, view.columns);
    std::vector<std::byte> packed(layout.bytes());
    for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
      layout.PackTile(view, tile, packed.data());
      const TileView packed_tile = layout.Tile(packed.data(), tile);
      for (int64_t first = 0; first < kGroupSize; first += batch) {
        const int64_t tokens = std::min<int64_t>(batch, kGroupSize - first);
        std::vector<float> a(tokens * kGroupSize), c(tokens * kTileRows, NAN);
        for (int64_t t = 0; t < tokens; ++t) a[t * kGroupSize + first + t] = 1.0f;
        kernels().multiply(path, &packed_tile, 1, 1, a.data(), tokens, c.data());
        for (int64_t i = 0; i < tokens * kTileRows; ++i) {
          const int64_t row = tile * kTileRows + i % kTileRows, k = first + i / kTileRows;
          const float scale = ScaleOf<F>(view, row), expected = Expected<F>(view, row, k, scale);
          ASSERT_EQ(std::bit_cast<uint32_t>(c[i]), std::bit_cast<uint32_t>(expected))
              << c[i] << " instead of " << expected << "; path " << static_cast<int>(path)
              << ", row " << row << ", k " << k << ", scale " << scale;
        }
      }
    }
  }

  void CheckAllScales(Path path, int64_t batch) {
    VisitFormat(format(), [&]<class F>(F) {
      size_t checked = 0;
      const auto scales = ValidScales<F>();
      for (size_t i = 0; i < scales.size(); ++i) {
        const float magnitude = std::fabs(scales[i].ToFloat());
        if (path == Path::kFoldedPanel && !kernels().folds_exactly(magnitude, magnitude)) continue;
        CheckPath<F>(path, batch, AllCodes<F>(scales[i], i));
        if (HasFatalFailure()) return;
        ++checked;
      }
      EXPECT_GT(checked, scales.size() * 9 / 10) << "hardly a scale folds";
    });
  }
};
CPUMOE_FOR_EACH_ISA_AND_FORMAT(DecodeTest);

TEST_P(DecodeTest, Fused) { CheckAllScales(Path::kFused, kernels().fused_tokens); }
TEST_P(DecodeTest, Digits) {
  if (!kernels().digits) GTEST_SKIP() << "this ISA does not multiply digits for " << format();
  CheckAllScales(Path::kDigits, 2 * kernels().panel_tokens + 1);
}
TEST_P(DecodeTest, ScaledPanel) {
  if (!kernels().scales_sums) GTEST_SKIP() << "scales of " << format() << " always fold";
  CheckAllScales(Path::kScaledPanel, 32);
}
TEST_P(DecodeTest, FoldedPanel) {
  if (!kernels().folds) {
    GTEST_SKIP() << "scales of " << format() << " do not fold into this ISA's multiplicands";
  }
  CheckAllScales(Path::kFoldedPanel, 32);
}

// Scales of fp16 are exact with every code of four bits. A row of the matrix has one scale and all
// codes.
TEST_P(DecodeTest, EveryFp16Scale) {
  VisitFormat(format(), [&]<class F>(F) {
    if constexpr (F::kCodeBits == 4 && InfoOf<F>().TakesScales(ScaleType::kFp16)) {
      constexpr int64_t kRows = 1 << 16;
      TestMatrix matrix(RowOf<F>(), kRows, kGroupSize, 0, ScaleGrid{.type = ScaleType::kFp16});
      const MutableRawMatrix view = matrix.MutableView();
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t i = 0; i < kGroupSize / 2; ++i) {
          const int64_t k = 2 * i + row;
          view.codes[row * view.codes_stride + i] =
              static_cast<std::byte>(k % 16 | (k + 1) % 16 << 4);
        }
        const auto bits = static_cast<uint16_t>((row & 0x7c00) == 0x7c00 ? row & 0xbfff : row);
        std::memcpy(view.ScalesOf(row), &bits, sizeof(bits));
      }
      CheckPath<F>(Path::kFused, kernels().fused_tokens, matrix);
      if (kernels().digits) CheckPath<F>(Path::kDigits, 4, matrix);
    } else {
      GTEST_SKIP() << "the format has no such scales";
    }
  });
}

// Packing lets the scales of groups of zeros fold, whatever they are.
TEST_P(DecodeTest, ZerosFoldWithAnyScale) {
  if (!kernels().folds) {
    GTEST_SKIP() << "scales of " << format() << " do not fold into this ISA's multiplicands";
  }
  VisitFormat(format(), [&]<class F>(F) {
    for (const auto scale : ValidScales<F>()) {
      TestMatrix zeros = AllCodes<F>(scale, 0);
      SetToZeros<F>(zeros.MutableView());
      CheckPath<F>(Path::kFoldedPanel, 32, zeros);
      if (HasFatalFailure()) return;
    }
  });
}

// Scales must not fold if their products leave the range of the multiplicands.
TEST_P(DecodeTest, OverflowDoesNotFold) {
  if (VisitFormat(format(), []<class F>(F) { return !HasScales<F>; })) {
    GTEST_SKIP() << "there are no scales";
  }
  EXPECT_FALSE(kernels().folds_exactly(1.0f, 0x1.8p127f));
  EXPECT_EQ(kernels().folds_exactly(0x1p-20f, 0x1p20f), kernels().folds);
}

}  // namespace
}  // namespace cpumoe
