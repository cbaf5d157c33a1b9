// Packing of scales: every grid and type, the ranges that decide about folding, and refusals.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/packing_test_util.h"
#include "cpp/test_matrix.h"
#include "formats/weight_format.h"
#include "packing/pack.h"

namespace cpumoe {
namespace {

// The packed scale of a weight.
template <class F>
float PackedScale(const PackedLayout<F>& layout, const std::vector<std::byte>& packed, int64_t row,
                  int64_t column) {
  const TileView tile = layout.Tile(packed.data(), row / kTileRows);
  const int64_t lane = column / kPackedDepthOf<F> * kTileRows + row % kTileRows;
  using Scale = PackedScaleOf<F>;
  return LoadScale<Scale>(tile.scales + lane * sizeof(Scale)).ToFloat();
}

template <class F>
class ScalePackingTest : public PackingTest<F> {
 protected:
  using Layout = PackedLayout<F>;
  using PackingTest<F>::Name;
  using PackingTest<F>::Pack;
  using PackingTest<F>::Unpack;

  static void CheckGrid(int64_t rows, int64_t columns, const ScaleGrid& grid) {
    SCOPED_TRACE(testing::Message() << "[" << rows << ", " << columns << "], " << grid.rows << " x "
                                    << grid.depth << ", type " << static_cast<int>(grid.type));
    Rng rng(8);
    const auto source = TestMatrix::Random(Name(), rows, columns, rng, Magnitudes{}, 3, grid);
    const Layout layout(rows, columns);
    const std::vector<std::byte> packed = Pack(layout, source.View());
    TestMatrix back(Name(), rows, columns, 3, grid);
    Unpack(layout, packed, 0, 0, back.MutableView());
    EXPECT_EQ(back, source);
    for (int64_t row = 0; row < rows; row += 7) {
      for (int64_t column = 0; column < columns; column += 32) {
        const float scale = VisitScaleType<typename F::Scale>(grid.type, [&]<class Stored>(Stored) {
          return LoadScale<Stored>(source.View().ScalesOf(row) +
                                   column / grid.depth * static_cast<int64_t>(sizeof(Stored)))
              .ToFloat();
        });
        ASSERT_EQ(PackedScale(layout, packed, row, column), scale) << row << ", " << column;
      }
    }
    // A shard that begins with a block.
    const int64_t row = grid.rows == 1 ? 5 : grid.rows;
    const int64_t column = grid.depth == columns ? 0 : RoundUp(grid.depth, int64_t{kGroupSize});
    TestMatrix shard(Name(), rows - row, columns - column, 0,
                     ScaleGrid{grid.rows, std::min(grid.depth, columns - column), grid.type});
    Unpack(layout, packed, row, column, shard.MutableView());
    const Layout part(rows - row, columns - column);
    EXPECT_EQ(
        Pack(part, shard.View()),
        Pack(part,
             source.View().Rows(row, rows - row).template Columns<F>(column, columns - column)));
  }
};
TYPED_TEST_SUITE(ScalePackingTest, ScaledFormats);

TYPED_TEST(ScalePackingTest, ScalesBecomeBf16) {
  using F = TypeParam;
  using Scale = typename F::Scale;
  if constexpr (HoldsScales(TypeOfScale<Scale>(), ScaleType::kBf16)) {
    std::vector<Scale> scales = ValidScales<F>();
    while (scales.size() * F::kScaleDepth % kGroupSize != 0) scales.push_back(scales.front());
    const auto groups = static_cast<int64_t>(scales.size());
    const int64_t rows = 17, columns = groups * F::kScaleDepth;
    TestMatrix source(this->Name(), rows, columns);
    const MutableRawMatrix view = source.MutableView();
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(view.scales + row * view.scales_stride, scales.data(), groups * sizeof(Scale));
    }
    const PackedLayout<F> layout(rows, columns);
    TestMatrix codes(this->Name(), rows, columns);
    std::vector<Bf16> numbers(rows * groups);
    MutableRawMatrix out = codes.MutableView();
    out.scales = reinterpret_cast<std::byte*>(numbers.data());
    out.scales_stride = groups * static_cast<int64_t>(sizeof(Bf16));
    out.grid.type = ScaleType::kBf16;
    this->Unpack(layout, this->Pack(layout, source.View()), 0, 0, out);
    for (int64_t i = 0; i < rows * groups; ++i) {
      EXPECT_EQ(numbers[i].ToFloat(), scales[i % groups].ToFloat()) << i % groups;
    }
    std::fill(numbers.begin(), numbers.end(), Bf16{0});
    constexpr int64_t kFirst = 2 * kGroupSize / F::kScaleDepth,
                      kEnd = 3 * kGroupSize / F::kScaleDepth;
    this->Unpack(layout, this->Pack(layout, source.View()), 0, 2 * kGroupSize,
                 out.template Columns<F>(2 * kGroupSize, kGroupSize));
    EXPECT_EQ(numbers[groups + kFirst].ToFloat(), scales[kFirst].ToFloat());
    EXPECT_EQ(numbers[groups + kEnd - 1].ToFloat(), scales[kEnd - 1].ToFloat());
    EXPECT_EQ(numbers[groups + kEnd].bits, 0);
  } else {
    GTEST_SKIP() << "bf16 does not hold the scales";
  }
}

TYPED_TEST(ScalePackingTest, ScaleRange) {
  using Scale = typename TypeParam::Scale;
  TestMatrix source(this->Name(), 17, 2 * UsualGrid<TypeParam>().depth);
  const MutableRawMatrix view = source.MutableView();
  // A byte that is no pair of zeros in any format with scales.
  std::memset(view.codes, 0x11, view.rows * view.codes_stride);
  const auto scales = ValidScales<TypeParam>();
  float least = INFINITY, greatest = 0;
  for (int64_t row = 0; row < view.rows; ++row) {
    for (int64_t g = 0; g < 2; ++g) {
      const Scale scale = scales[(row * 37 + g * 101) % scales.size()];
      std::memcpy(view.scales + row * view.scales_stride + g * sizeof(Scale), &scale,
                  sizeof(Scale));
      least = std::min(least, std::fabs(scale.ToFloat()));
      greatest = std::max(greatest, std::fabs(scale.ToFloat()));
    }
  }
  ScaleRange range;
  this->Pack(PackedLayout<TypeParam>(view.rows, view.columns), source.View(), &range);
  EXPECT_EQ(range.least, least);
  EXPECT_EQ(range.greatest, greatest);
}

// They would keep the other groups' scales from folding.
TYPED_TEST(ScalePackingTest, ScaleRangeLeavesOutGroupsOfZeros) {
  using Scale = typename TypeParam::Scale;
  if constexpr (requires { TypeParam::kLeastScale; }) GTEST_SKIP() << "all scales fold";
  Rng rng(7);
  const int64_t depth = TypeParam::kScaleDepth, columns = 3 * depth;
  auto source = TestMatrix::Random(this->Name(), 17, columns, rng);
  std::memset(source.MutableView().codes, 0x11, 17 * source.View().codes_stride);
  const PackedLayout<TypeParam> layout(17, columns);
  ScaleRange moderate;
  this->Pack(layout, source.View(), &moderate);
  for (const Scale extreme : {ValidScales<TypeParam>().front(), ValidScales<TypeParam>().back()}) {
    MutableRawMatrix row = source.MutableView().Rows(5, 1);
    std::memcpy(row.scales + sizeof(Scale), &extreme, sizeof(Scale));
    ScaleRange range;
    this->Pack(layout, source.View(), &range);
    EXPECT_TRUE(range.least < moderate.least || range.greatest > moderate.greatest);
    row = row.Columns<TypeParam>(depth, depth);
    SetToZeros<TypeParam>(row);
    range = {};
    this->Pack(layout, source.View(), &range);
    EXPECT_LE(moderate.least, range.least);
    EXPECT_GE(moderate.greatest, range.greatest);
    std::memset(row.codes, 0x11, depth * TypeParam::kCodeBits / 8);
  }
}

TYPED_TEST(ScalePackingTest, RefusesAnInvalidScaleWithItsPlace) {
  using F = TypeParam;
  using Scale = typename F::Scale;
  Scale invalid;
  std::memset(&invalid, 0xff, sizeof(invalid));  // NaN in every scale type
  ASSERT_FALSE(F::IsValidScale(invalid));
  Rng rng(6);
  auto source = TestMatrix::Random(this->Name(), 20, 4 * F::kScaleDepth, rng);
  const MutableRawMatrix view = source.MutableView();
  std::memcpy(view.scales + 18 * view.scales_stride + 2 * sizeof(Scale), &invalid, sizeof(Scale));
  const PackedLayout<F> layout(view.rows, view.columns);
  const std::string nan = std::signbit(invalid.ToFloat()) ? "-nan" : "nan";
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { this->Pack(layout, source.View()); }),
            "test.weight: scale [18, 2] is " + nan + "; " + std::string(F::kName) +
                " scales must be finite: the checkpoint is damaged");
}

// Every grid and type that a format allows: scales come back as they were, from all rows and from
// shards, and packed tiles hold what the reference reads.
TYPED_TEST(ScalePackingTest, EveryGridOfScales) {
  using F = TypeParam;
  constexpr int64_t kDepth = kPackedDepthOf<F>;
  for (const int64_t columns : {12 * kDepth, 12 * kDepth - 32, 12 * kDepth - 22}) {
    for (const int64_t depth : {kDepth, 2 * kDepth, 4 * kDepth, 5 * kDepth, columns}) {
      for (const int64_t block_rows : {1, 128}) {
        for (const auto type : {ScaleType::kOwn, ScaleType::kE8M0, ScaleType::kBf16,
                                ScaleType::kFp32, ScaleType::kFp16}) {
          const ScaleGrid grid = {block_rows, depth, type};
          if (AllowsScaleDepth<F>(depth, columns) && AllowsScaleRows<F>(block_rows) &&
              AllowsScaleType<F>(type)) {
            this->CheckGrid(150, columns, grid);
          }
        }
      }
    }
  }
}

// All finite numbers of fp16 come back, and kernels read their values.
TYPED_TEST(ScalePackingTest, EveryFp16Scale) {
  using F = TypeParam;
  if constexpr (HoldsScales(ScaleType::kFp16, TypeOfScale<PackedScaleOf<F>>()) &&
                AllowsScaleType<F>(ScaleType::kFp16)) {
    std::vector<Fp16> scales;
    for (uint32_t bits = 0; bits < (1u << 16); ++bits) {
      if ((bits & 0x7fff) < 0x7c00) scales.push_back({static_cast<uint16_t>(bits)});
    }
    constexpr int64_t kDepth = F::kScaleDepth;
    const int64_t rows = 16, count = std::ssize(scales) / rows, columns = count * kDepth;
    const ScaleGrid grid = {.depth = kDepth, .type = ScaleType::kFp16};
    TestMatrix source(this->Name(), rows, columns, 0, grid);
    const MutableRawMatrix view = source.MutableView();
    SetToZeros<F>(view);
    std::memcpy(view.scales, scales.data(), scales.size() * sizeof(Fp16));
    const PackedLayout<F> layout(rows, columns);
    const std::vector<std::byte> packed = this->Pack(layout, source.View());
    for (int64_t i = 0; i < std::ssize(scales); ++i) {
      const float packed_scale = PackedScale(layout, packed, i / count, i % count * kDepth);
      ASSERT_EQ(std::bit_cast<uint32_t>(packed_scale), std::bit_cast<uint32_t>(scales[i].ToFloat()))
          << scales[i].bits;
    }
    TestMatrix back(this->Name(), rows, columns, 0, grid);
    this->Unpack(layout, packed, 0, 0, back.MutableView());
    EXPECT_EQ(back, source);
    for (const uint16_t bits : {0x7c00, 0xfc00, 0x7c01, 0xfe00}) {
      std::memcpy(view.scales + 2 * view.scales_stride, &bits, sizeof(bits));
      EXPECT_TRUE(MessageOf<std::invalid_argument>([&] {
                    this->Pack(layout, source.View());
                  }).starts_with("test.weight: scale [2, 0] is "))
          << bits;
    }
  } else {
    GTEST_SKIP() << "the format has no such scales";
  }
}

// A shard must not begin within a block of scales and end in another one.
TYPED_TEST(ScalePackingTest, RefusesShardsThatCutBlocks) {
  using F = TypeParam;
  if (!AllowsScaleRows<F>(128)) GTEST_SKIP() << "rows do not share scales";
  const TestMatrix matrix(this->Name(), 300, 512, 0, ScaleGrid{128, 128});
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { matrix.View().Rows(64, 128); }),
            "test.weight: a slice of rows must begin with a block of 128 rows that share their "
            "scales, got [64, 192)");
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { matrix.View().template Columns<F>(32, 128); }),
            "test.weight: a slice of columns must begin with one of the 128 weights that share a "
            "scale, got [32, 160)");
  EXPECT_EQ(matrix.View().Rows(160, 64).scales, matrix.View().ScalesOf(128));
}

}  // namespace
}  // namespace cpumoe
