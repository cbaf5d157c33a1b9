// Packing of every weight format: checkpoint rows become tiles and rows again, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpp/all_formats.h"
#include "cpp/packing_test_util.h"
#include "cpp/test_matrix.h"
#include "formats/weight_format.h"
#include "packing/pack.h"
#include "packing/unpack-inl.h"

namespace cpumoe {
namespace {

// The bit of a lane at which the code of `k` lies, as kernels/tile.h draws it.
template <int kCodeBits>
constexpr int LaneBit(int k) {
  const int per_half = 16 / kCodeBits;  // codes per half-word
  const int even = k - k % 2;
  const int field = even < per_half ? even : even - per_half + 1;
  return (k % 2) * 16 + field * kCodeBits;
}

template <int kCodeBits>
void CheckEvenOdd() {
  static_assert(SwapEvenOdd<kCodeBits>(SwapEvenOdd<kCodeBits>(0x12345678u)) == 0x12345678u);
  Rng rng(kCodeBits);
  for (int i = 0; i < 1000; ++i) {
    const auto word = static_cast<uint32_t>(rng());
    const uint32_t lane = SwapEvenOdd<kCodeBits>(word);
    const uint32_t mask = (uint64_t{1} << kCodeBits) - 1;
    for (int k = 0; k < 32 / kCodeBits; ++k) {
      EXPECT_EQ((lane >> LaneBit<kCodeBits>(k)) & mask, (word >> (k * kCodeBits)) & mask);
    }
    EXPECT_EQ(SwapEvenOdd<kCodeBits>(lane), word);
  }
}

TEST(EvenOddTest, FourBits) { CheckEvenOdd<4>(); }
TEST(EvenOddTest, EightBits) { CheckEvenOdd<8>(); }
TEST(EvenOddTest, SixteenBits) { CheckEvenOdd<16>(); }
TEST(EvenOddTest, AsDrawnInTileH) { EXPECT_EQ(SwapEvenOdd<4>(0x76543210u), 0x73516240u); }

TYPED_TEST_SUITE(PackingTest, AllFormats);

TYPED_TEST(PackingTest, RoundTripOfAnyShape) {
  Rng rng(1);
  for (const int64_t rows : {1, 15, 16, 17, 32, 33}) {
    for (const int64_t groups : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 64, 73}) {
      const int64_t missing = groups * 6 % kGroupSize;  // columns of the last group
      const int64_t columns = missing == 0
                                  ? groups * kGroupSize
                                  : OddIfPossible<TypeParam>(groups * kGroupSize - missing);
      const auto source = TestMatrix::Random(this->Name(), rows, columns, rng, Magnitudes{});
      const PackedLayout<TypeParam> layout(rows, columns);
      const std::vector<std::byte> packed = this->Pack(layout, source.View());
      const auto round_trip = [&]<class Isa>(Isa) {
        TestMatrix back(this->Name(), rows, columns);
        this->template Unpack<Isa>(layout, packed, 0, 0, back.MutableView());
        ASSERT_EQ(back, source) << "[" << rows << ", " << columns << "], registers of "
                                << Isa::kRegisterBytes << " bytes";
      };
      round_trip(PlainStores<16>());
      round_trip(PlainStores<32>());
      round_trip(PlainStores<64>());
    }
  }
}

// The tile is as kernels/tile.h documents it, code by code and scale by scale.
TYPED_TEST(PackingTest, Layout) {
  using F = TypeParam;
  using Scale = PackedScaleOf<F>;
  constexpr int64_t kScaleBytes = kBytesOfScale<Scale>;
  Rng rng(2);
  const int64_t rows = 21, columns = OddIfPossible<F>(72 * kGroupSize + 10);
  const auto source = TestMatrix::Random(this->Name(), rows, columns, rng, Magnitudes{});
  const RawMatrix view = source.View();
  const PackedLayout<F> layout(rows, columns);
  const std::vector<std::byte> packed = this->Pack(layout, view);
  constexpr int kDepth = 32 / F::kCodeBits;
  constexpr uint32_t kMask = (uint64_t{1} << F::kCodeBits) - 1;
  for (int64_t row = 0; row < layout.tiles() * kTileRows; ++row) {
    const int64_t from = std::min(row, rows - 1);  // missing rows repeat the last
    const TileView tile = layout.Tile(packed.data(), row / kTileRows);
    const int64_t lane = row % kTileRows;
    for (int64_t k = 0; k < 73 * kGroupSize; ++k) {
      uint32_t word, original = 0;
      std::memcpy(&word, tile.codes + k / kDepth * kVectorBytes + lane * 4, 4);
      const auto place = static_cast<int>(k % kDepth);
      const uint32_t code = (word >> LaneBit<F::kCodeBits>(place)) & kMask;
      if (k >= columns) {  // zeros fill the last group
        ASSERT_EQ(F::Decode(code), 0.0f) << "row " << row << ", k " << k;
        continue;
      }
      const int64_t bit = k * F::kCodeBits;
      std::memcpy(&original, view.codes + from * view.codes_stride + bit / 8,
                  std::max(F::kCodeBits / 8, 1));
      ASSERT_EQ(code, (original >> (bit % 8)) & kMask) << "row " << row << ", k " << k;
    }
    for (int64_t g = 0; g < layout.runs(); ++g) {
      if constexpr (HasScales<F>) {
        using Stored = typename F::Scale;
        const int64_t at = std::min(g, view.scale_columns() - 1);  // of the last group's last part
        const std::byte* stored = view.scales + from * view.scales_stride + at * sizeof(Stored);
        EXPECT_EQ(LoadScale<Scale>(tile.scales + (g * kTileRows + lane) * kScaleBytes).ToFloat(),
                  LoadScale<Stored>(stored).ToFloat());
      }
    }
  }
}

TYPED_TEST(PackingTest, StridedRows) {
  Rng rng(3);
  const int64_t rows = 19, columns = 2 * kGroupSize;
  const auto interleaved = TestMatrix::Random(this->Name(), 2 * rows, columns, rng);
  const PackedLayout<TypeParam> layout(rows, columns);
  TestMatrix back(this->Name(), 2 * rows, columns);
  for (const int64_t first : {0, 1}) {  // gate rows are the even ones, up rows the odd ones
    RawMatrix half = interleaved.View().Rows(first, 2 * rows - 1);
    MutableRawMatrix out = back.MutableView().Rows(first, 2 * rows - 1);
    half.rows = out.rows = rows;
    half.codes_stride *= 2, half.scales_stride *= 2;
    out.codes_stride *= 2, out.scales_stride *= 2;
    this->Unpack(layout, this->Pack(layout, half), 0, 0, out);
  }
  EXPECT_EQ(back, interleaved);
}

// Memory for rows of codes and scales, each `misaligned` bytes behind the beginning of a line, with
// `gap` bytes between rows. A pattern fills the rest.
class OddMemory {
 public:
  OddMemory(int64_t rows, int64_t code_bytes, int64_t scale_bytes, int64_t misaligned, int64_t gap)
      : rows_(rows),
        misaligned_(misaligned),
        strides_{code_bytes + gap, scale_bytes + gap},
        sizes_{code_bytes, scale_bytes} {
    for (int i = 0; i < 2; ++i) {
      buffers_[i] = AlignedBuffer(misaligned + rows * strides_[i] + 1);
      std::memset(buffers_[i].data(), kFiller, buffers_[i].size());
    }
  }

  MutableRawMatrix View(int64_t columns, const ScaleGrid& grid) const {
    return {.rows = rows_,
            .columns = columns,
            .codes = buffers_[0].data() + misaligned_,
            .codes_stride = strides_[0],
            .scales = buffers_[1].data() + misaligned_,
            .scales_stride = strides_[1],
            .grid = grid};
  }

  void ExpectRows(const RawMatrix& source) const {
    const std::byte* from[] = {source.codes, source.scales};
    const int64_t from_strides[] = {source.codes_stride, source.scales_stride};
    for (int i = 0; i < 2; ++i) {
      std::vector<std::byte> expected(buffers_[i].size(), std::byte{kFiller});
      for (int64_t row = 0; row < rows_; ++row) {
        std::copy_n(from[i] + row * from_strides[i], sizes_[i],
                    expected.data() + misaligned_ + row * strides_[i]);
      }
      EXPECT_EQ(std::memcmp(buffers_[i].data(), expected.data(), expected.size()), 0)
          << (i == 0 ? "codes" : "scales") << ", misaligned by " << misaligned_;
    }
  }

 private:
  static constexpr uint8_t kFiller = 0xee;

  const int64_t rows_, misaligned_;
  const int64_t strides_[2], sizes_[2];
  AlignedBuffer buffers_[2];
};

// Only whole lines are streamed: all of a row that begins and ends with a line, none of a short
// one.
TYPED_TEST(PackingTest, RowsAtAnyAddress) {
  using F = TypeParam;
  Rng rng(7);
  for (const int64_t most : {128, 640, 1024, 1046}) {
    const int64_t rows = 35, columns = most % kGroupSize == 0 ? most : OddIfPossible<F>(most);
    const auto source = TestMatrix::Random(this->Name(), rows, columns, rng, Magnitudes{});
    const PackedLayout<F> layout(rows, columns);
    const std::vector<std::byte> packed = this->Pack(layout, source.View());
    const int64_t code_bytes = columns * F::kCodeBits / 8;
    const int64_t scale_bytes = source.View().scale_columns() * kBytesOfScale<typename F::Scale>;
    for (const int64_t misaligned : {0, 1, 31, 63}) {
      for (const int64_t gap : {0, 5, 64}) {
        const auto unpack = [&]<class Isa>(Isa) {
          const OddMemory memory(rows, code_bytes, scale_bytes, misaligned, gap);
          Isa::streamed = 0;
          this->template Unpack<Isa>(layout, packed, 0, 0, memory.View(columns, UsualGrid<F>()));
          memory.ExpectRows(source.View());
          if (misaligned == 0 && (code_bytes + gap) % kVectorBytes == 0) {
            EXPECT_GE(Isa::streamed, rows * (code_bytes / kVectorBytes));
          }
        };
        unpack(PlainStores<16>());
        unpack(PlainStores<32>());
        unpack(PlainStores<64>());
      }
    }
  }
}

TYPED_TEST(PackingTest, GapsBetweenRowsAreLeftAlone) {
  Rng rng(4);
  const int64_t rows = 5, columns = kGroupSize;
  const auto source = TestMatrix::Random(this->Name(), rows, columns, rng, kModerate, 3);
  TestMatrix back(this->Name(), rows, columns, 3);
  const PackedLayout<TypeParam> layout(rows, columns);
  this->Unpack(layout, this->Pack(layout, source.View()), 0, 0, back.MutableView());
  EXPECT_EQ(back, source);  // gaps hold the same filler in both
}

TYPED_TEST(PackingTest, SlicesOfTheSource) {
  using F = TypeParam;
  Rng rng(5);
  const int64_t depth = ColumnUnit<F>();
  const int64_t rows = 40, columns = 4 * depth;
  const auto source = TestMatrix::Random(this->Name(), rows, columns, rng);
  const int64_t row_begin = 7, row_count = 18;
  const int64_t column_begin = depth, column_count = 2 * depth;
  const RawMatrix slice =
      source.View().Rows(row_begin, row_count).template Columns<F>(column_begin, column_count);
  const PackedLayout<F> part(row_count, column_count);
  TestMatrix from_slice(this->Name(), row_count, column_count);
  this->Unpack(part, this->Pack(part, slice), 0, 0, from_slice.MutableView());
  // The export of a part of the whole matrix is that part.
  const PackedLayout<F> whole(rows, columns);
  TestMatrix from_whole(this->Name(), row_count, column_count);
  this->Unpack(whole, this->Pack(whole, source.View()), row_begin, column_begin,
               from_whole.MutableView());
  EXPECT_EQ(from_slice, from_whole);
  TestMatrix copy = source;
  this->Unpack(part, this->Pack(part, slice), 0, 0,
               copy.MutableView()
                   .Rows(row_begin, row_count)
                   .template Columns<F>(column_begin, column_count));
  EXPECT_EQ(copy, source);
}

TYPED_TEST(PackingTest, RefusesACodeThatIsNotFinite) {
  using F = TypeParam;
  if constexpr (requires { F::kNotFinite; }) {
    constexpr uint32_t kSign = 1u << (F::kCodeBits - 1);
    Rng rng(9);
    for (const uint32_t code : {uint32_t{F::kNotFinite}, F::kNotFinite | kSign, kSign - 1}) {
      auto source = TestMatrix::Random(this->Name(), 20, 4 * kGroupSize, rng);
      const MutableRawMatrix view = source.MutableView();
      constexpr int kBytes = F::kCodeBits / 8;
      std::memcpy(view.codes + 18 * view.codes_stride + 77 * kBytes, &code, kBytes);
      const PackedLayout<F> layout(view.rows, view.columns);
      const float weight = F::Decode(code);
      const std::string shown = std::isnan(weight) ? "nan" : weight < 0 ? "-inf" : "inf";
      EXPECT_EQ(MessageOf<std::invalid_argument>([&] { this->Pack(layout, source.View()); }),
                "test.weight: weight [18, 77] is " + shown + "; " + std::string(F::kName) +
                    " weights must be finite: the checkpoint is damaged");
    }
  } else {
    GTEST_SKIP() << "every code is a number";
  }
}

TYPED_TEST(PackingTest, RefusesColumnsThatItCannotHave) {
  using F = TypeParam;
  const std::string group = std::to_string(kGroupSize);
  if (F::kCodeBits < 8) {
    EXPECT_EQ(MessageOf<std::invalid_argument>([] { PackedLayout<F>(16, 33); }),
              std::string(F::kName) +
                  ": columns must be a multiple of 2, because a byte has 2 codes, got 33");
  }
  const TestMatrix matrix(this->Name(), 4, 2 * kGroupSize);
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { matrix.View().template Columns<F>(0, 8); }),
            "test.weight: a slice of columns must consist of whole groups of " + group +
                ", got [0, 8) of 64");
  EXPECT_THROW(matrix.View().template Columns<F>(0, 3 * kGroupSize), std::invalid_argument);
  EXPECT_EQ(MessageOf<std::invalid_argument>([&] { matrix.View().Rows(3, 2); }),
            "test.weight: rows [3, 5) are not within the matrix's 4");
}

}  // namespace
}  // namespace cpumoe
