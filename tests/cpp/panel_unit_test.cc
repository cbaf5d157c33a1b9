// The panel unit of AMX: in which order it adds, and how many tile instructions a block takes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/isa_test.h"
#include "cpp/reference_weight.h"
#include "cpp/test_matrix.h"
#include "emulator/emulator.h"
#include "packing/pack.h"

namespace cpumoe {
namespace {

using emulator::Instruction;
using kernel_probe::Path;

class PanelUnitTest : public IsaFormatTest {
 protected:
  void SetUp() override {
    IsaFormatTest::SetUp();
    RequireKernels(&kernel_probe::FormatEntry::panel_unit, "panel unit");
  }

  static constexpr int kTiles = 2;
  static constexpr int64_t kRows = kTiles * kTileRows;

  std::vector<Path> Paths() const {
    std::vector<Path> paths;
    if (kernels().folds) paths.push_back(Path::kFoldedPanel);
    if (kernels().scales_sums) paths.push_back(Path::kScaledPanel);
    return paths;
  }

  template <class F>
  std::vector<float> Multiply(Path path, const RawMatrix& matrix, const std::vector<float>& a) {
    const PackedLayout<F> layout(matrix.rows, matrix.columns);
    std::vector<std::byte> packed(layout.bytes());
    TileView tiles[kTiles];
    for (int tile = 0; tile < kTiles; ++tile) {
      layout.PackTile(matrix, tile, packed.data());
      tiles[tile] = layout.Tile(packed.data(), tile);
    }
    const auto tokens = static_cast<int64_t>(a.size()) / matrix.columns;
    std::vector<float> c(tokens * matrix.rows, NAN);
    kernels().multiply(path, tiles, kTiles, layout.groups(), a.data(), tokens, c.data());
    return c;
  }

  // The scale of a run of groups that begins at column k.
  template <class F>
  static float ScaleOf(const RawMatrix& matrix, int64_t row, int64_t k) {
    typename F::Scale scale{};
    if constexpr (HasScales<F>) {
      std::memcpy(
          &scale,
          matrix.scales + row * matrix.scales_stride + k / matrix.grid.depth * sizeof(scale),
          sizeof(scale));
    }
    return scale.ToFloat();
  }

  // TDPBF16PS adds the products of even k in one chain and those of odd k in another, then both to
  // the sum. Sums of runs are scaled as they are added to C, in the order of runs.
  template <class F>
  static float Expected(Path path, const RawMatrix& matrix, int64_t row, const float* x) {
    const bool folded = path == Path::kFoldedPanel || !HasScales<F>;
    const int64_t run = folded ? matrix.columns : std::max(kPackedDepthOf<F>, kGroupSize);
    float c = 0;
    for (int64_t begin = 0; begin < matrix.columns; begin += run) {
      const float scale = folded ? 1.0f : ScaleOf<F>(matrix, row, begin);
      float sum = 0;
      for (int64_t k = begin; k < std::min(begin + run, matrix.columns); k += kGroupSize) {
        float chains[2] = {};
        for (int64_t i = k; i < k + kGroupSize; ++i) {
          const double weight = ReferenceWeight<F>(matrix, row, i) / scale;
          chains[i % 2] = std::fma(static_cast<float>(weight), x[i], chains[i % 2]);
        }
        sum += chains[0] + chains[1];
      }
      c = std::fma(sum, scale, c);
    }
    return c;
  }

  Rng rng_{7};
};

std::vector<IsaFormat> FormatsOnAmx() {
  std::vector<IsaFormat> all;
  for (const std::string& format : FormatNames()) all.push_back({.isa = "amx", .format = format});
  return all;
}
INSTANTIATE_TEST_SUITE_P(, PanelUnitTest, testing::ValuesIn(FormatsOnAmx()), NameOfIsaFormat);

// Every shape of a block, and sets of tokens that overlap; odd and even numbers of runs.
TEST_P(PanelUnitTest, SumsHaveOneOrder) {
  run_.ExpectBestDots();
  std::normal_distribution<float> normal;
  VisitFormat(format(), [&]<class F>(F) {
    for (const int64_t groups : {1, 2, 8, 9}) {
      const auto matrix = TestMatrix::Random(format(), kRows, groups * kGroupSize, rng_);
      for (const int64_t tokens : {1, 16, 17, 33, 34, 48, 49, 64, 97}) {
        std::vector<float> a(tokens * groups * kGroupSize);
        for (float& x : a) x = Bf16::FromFloat(normal(rng_)).ToFloat();
        for (const Path path : Paths()) {
          const std::vector<float> c = Multiply<F>(path, matrix.View(), a);
          for (int64_t i = 0; i < tokens * kRows; ++i) {
            const float* x = &a[i / kRows * groups * kGroupSize];
            ASSERT_EQ(c[i], Expected<F>(path, matrix.View(), i % kRows, x))
                << groups << " groups, token " << i / kRows << " of " << tokens << ", row "
                << i % kRows << ", path " << static_cast<int>(path);
          }
        }
      }
    }
  });
}

// Tokens, and for each group of two tiles: products, loads of tiles, stores of C.
struct Cost {
  int64_t tokens;
  uint64_t products, loads, stores;
};
constexpr Cost kCosts[] = {{6, 2, 3, 2},     {24, 4, 4, 4},     {32, 4, 4, 4},
                           {33, 6, 7, 6},    {48, 6, 7, 6},     {64, 8, 10, 8},
                           {96, 12, 14, 12}, {128, 16, 20, 16}, {144, 18, 21, 18}};

// C leaves the unit once for each block and run of scales, or once for each block if scales fold.
TEST_P(PanelUnitTest, TileInstructionsOfAGroup) {
  constexpr int64_t kGroups = 8;
  VisitFormat(format(), [&]<class F>(F) {
    const int64_t run = std::max(kPackedDepthOf<F>, kGroupSize) / kGroupSize;
    const auto matrix = TestMatrix::Random(format(), kRows, kGroups * kGroupSize, rng_);
    for (const Cost& cost : kCosts) {
      const std::vector<float> a(cost.tokens * kGroups * kGroupSize);
      for (const Path path : Paths()) {
        const bool folded = path == Path::kFoldedPanel || !HasScales<F>;
        emulator::ResetCounts();
        Multiply<F>(path, matrix.View(), a);
        if (emulator::Count(Instruction::kTdpbf16ps) == 0) {
          GTEST_SKIP() << "this CPU has AMX, nothing is counted";
        }
        EXPECT_EQ(emulator::Count(Instruction::kTdpbf16ps), kGroups * cost.products);
        EXPECT_EQ(emulator::Count(Instruction::kTileloadd), kGroups * cost.loads);
        EXPECT_EQ(emulator::Count(Instruction::kTilestored),
                  (folded ? 1 : kGroups / run) * cost.stores)
            << cost.tokens << " tokens, path " << static_cast<int>(path);
      }
    }
  });
}

}  // namespace
}  // namespace cpumoe
