// Compares the GEMM kernels of every ISA x format with sums in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/isa_test.h"
#include "cpp/reference_weight.h"
#include "cpp/test_matrix.h"
#include "packing/pack.h"

namespace cpumoe {
namespace {

using kernel_probe::Path;

// The weights of one or two tiles, packed and in double precision.
struct Weights {
  int64_t columns;
  std::vector<std::byte> packed;
  std::vector<TileView> tiles;
  std::vector<double> values;  // [rows, columns]

  int64_t rows() const { return static_cast<int64_t>(tiles.size()) * kTileRows; }
};

class GemmTest : public IsaFormatTest {
 protected:
  // Makes weights with random codes, or with all bytes equal to `codes`.
  Weights MakeWeights(int64_t tiles, int64_t groups, std::optional<std::byte> codes = {}) {
    return VisitFormat(format(), [&]<class F>(F) {
      const int64_t rows = tiles * kTileRows, columns = groups * kGroupSize;
      auto matrix = TestMatrix::Random(format(), rows, columns, rng_);
      if (codes) {
        const MutableRawMatrix view = matrix.MutableView();
        std::fill_n(view.codes, rows * view.codes_stride, *codes);
      }
      const PackedLayout<F> layout(rows, columns);
      Weights w{columns, std::vector<std::byte>(layout.bytes()), {}, {}};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        layout.PackTile(matrix.View(), tile, w.packed.data());
        w.tiles.push_back(layout.Tile(w.packed.data(), tile));
      }
      for (int64_t i = 0; i < rows * columns; ++i) {
        w.values.push_back(ReferenceWeight<F>(matrix.View(), i / columns, i % columns));
      }
      return w;
    });
  }

  // Makes activations that int8 holds exactly: multiples of a power of two, up to 127 times it.
  // Every group has that greatest multiple.
  std::vector<float> MakeInt8Activations(int64_t count) {
    std::uniform_int_distribution<int> value(-127, 127), exponent(-20, 20);
    std::vector<float> a(count);
    const int64_t group = VisitFormat(format(), []<class F>(F) { return kGroupSize; });
    for (int64_t i = 0, power = 0; i < count; ++i) {
      if (i % group == 0) power = exponent(rng_);
      const int number = i % group == 7 ? -127 : value(rng_);
      a[i] = std::ldexp(static_cast<float>(number), static_cast<int>(power));
    }
    return a;
  }

  // Makes activations that every ISA's Activation holds exactly: bf16 numbers.
  std::vector<float> MakeActivations(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> a(count);
    for (float& x : a) x = Bf16::FromFloat(normal(rng_)).ToFloat();
    return a;
  }

  std::vector<float> Multiply(Path path, const Weights& w, const std::vector<float>& a) const {
    const auto tokens = static_cast<int64_t>(a.size()) / w.columns;
    const int64_t group = VisitFormat(format(), []<class F>(F) { return kGroupSize; });
    std::vector<float> c(tokens * w.rows(), NAN);
    kernels().multiply(path, w.tiles.data(), static_cast<int>(w.tiles.size()), w.columns / group,
                       a.data(), tokens, c.data());
    return c;
  }

  std::vector<Path> PathsFor(int64_t tokens) const {
    std::vector<Path> paths;
    if (kernels().scales_sums) paths.push_back(Path::kScaledPanel);
    if (kernels().digits) paths.insert(paths.end(), {Path::kDigits, Path::kDigitsOfBf16});
    if (kernels().folds) paths.push_back(Path::kFoldedPanel);
    if (tokens <= kernels().fused_tokens) paths.push_back(Path::kFused);
    return paths;
  }

  // Returns the activations as kernels hold them. The digit path holds integers of 21 bits, or of
  // 14 bits if the activations are bf16 and their group has no outlier.
  std::vector<float> Held(Path path, std::vector<float> a) const {
    if (path != Path::kDigits && path != Path::kDigitsOfBf16) return a;
    const int64_t group = VisitFormat(format(), []<class F>(F) { return kGroupSize; });
    for (auto x = a.begin(); x != a.end(); x += group) {
      double greatest = 0, sum = 0;
      for (int64_t i = 0; i < group; ++i) greatest = std::max(greatest, std::fabs(double{x[i]}));
      if (greatest == 0) continue;
      const auto round = [&](double value, int bits) {
        return std::nearbyint(std::ldexp(value, bits - 1 - std::ilogb(greatest)));
      };
      for (int64_t i = 0; i < group; ++i) sum += std::fabs(round(x[i], 13));
      const bool outlier = sum < 3 * round(greatest, 13);
      const int bits = path == Path::kDigits || outlier ? 20 : 13;
      for (int64_t i = 0; i < group; ++i) {
        x[i] = static_cast<float>(std::ldexp(round(x[i], bits), 1 - bits + std::ilogb(greatest)));
      }
    }
    return a;
  }

  void CheckProduct(Path path, const Weights& w, const std::vector<float>& a) const {
    CheckSums(w, Held(path, a), Multiply(path, w, a));
  }

  // Products are exact or rounded once. Each of the K products passes at most K + 2 + K / group
  // additions and scalings, so |error| <= gamma * sum |w a| with gamma = n u / (1 - n u). Subnormal
  // sums additionally lose up to `lost`.
  static void CheckSums(const Weights& w, const std::vector<float>& a, const std::vector<float>& c,
                        double lost = 0) {
    const double n =
        3.0 * static_cast<double>(w.columns) * std::numeric_limits<float>::epsilon() / 2;
    for (int64_t i = 0; i < static_cast<int64_t>(c.size()); ++i) {
      const double* weights = &w.values[i % w.rows() * w.columns];
      const float* x = &a[i / w.rows() * w.columns];
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < w.columns; ++k) {
        sum += weights[k] * x[k];
        magnitude += std::fabs(weights[k] * x[k]);
      }
      ASSERT_NEAR(c[i], sum, n / (1 - n) * magnitude + lost)
          << "token " << i / w.rows() << ", row " << i % w.rows() << ", K " << w.columns;
    }
  }

  Rng rng_{7};
};
CPUMOE_FOR_EACH_ISA_AND_FORMAT(GemmTest);

class DigitsTest : public GemmTest {
 protected:
  void SetUp() override {
    GemmTest::SetUp();
    RequireKernels(&kernel_probe::FormatEntry::digits, "digits");
  }
};
CPUMOE_FOR_EACH_ISA_AND_FORMAT(DigitsTest);

class Int8Test : public GemmTest {
 protected:
  void SetUp() override {
    GemmTest::SetUp();
    RequireKernels(&kernel_probe::FormatEntry::int8, "int8 path");
  }
};
CPUMOE_FOR_EACH_ISA_AND_FORMAT(Int8Test);

TEST_P(GemmTest, AnyNumberOfTokensAndTiles) {
  ExpectBestDots();
  for (const int64_t tiles : {1, 2}) {
    const Weights w = MakeWeights(tiles, 3);
    for (int64_t tokens = 1; tokens <= 2 * kernels().panel_tokens + 1; ++tokens) {
      const std::vector<float> a = MakeActivations(tokens * w.columns);
      for (const Path path : PathsFor(tokens)) CheckProduct(path, w, a);
    }
  }
}

// K is one panel, one group less, one group more, and several panels.
TEST_P(GemmTest, AnyDepth) {
  const int64_t panel = kernels().panel_groups;
  for (const int64_t groups : {int64_t{1}, panel - 1, panel, panel + 1, 2 * panel + 3}) {
    const Weights w = MakeWeights(2, groups);
    for (const int64_t tokens : {int64_t{1}, kernels().panel_tokens + 1}) {
      const std::vector<float> a = MakeActivations(tokens * w.columns);
      for (const Path path : PathsFor(tokens)) CheckProduct(path, w, a);
    }
  }
}

// Rounding to int8 changes nothing here, so the kernels' sums must be exact.
TEST_P(Int8Test, SumsAreExact) {
  for (const int64_t groups : {1, 3, 63, 64, 65, 130}) {
    const Weights w = MakeWeights(groups % 2 + 1, groups);
    for (int64_t tokens = 1; tokens <= 2 * kernels().int8_tokens + 1; ++tokens) {
      const std::vector<float> a = MakeInt8Activations(tokens * w.columns);
      CheckSums(w, a, Multiply(Path::kInt8, w, a));
    }
  }
}

// The greatest possible sums. Narrow sums must not overflow.
TEST_P(Int8Test, Extremes) {
  for (const std::byte codes : {std::byte{0x77}, std::byte{0xff}, std::byte{0x00}}) {
    const Weights w = MakeWeights(2, 2, codes);
    for (const float a : {127.0f, -127.0f}) {
      for (const int64_t tokens : {int64_t{1}, kernels().int8_tokens + 1}) {
        // Activations at all k, or at even or odd k only, each of which is half of every quad.
        for (const int64_t step : {1, 2}) {
          for (int64_t first = 0; first < step; ++first) {
            std::vector<float> x(tokens * w.columns);
            for (size_t i = first; i < x.size(); i += step) x[i] = a;
            CheckSums(w, x, Multiply(Path::kInt8, w, x));
          }
        }
      }
    }
  }
}

// Groups with the greatest and the most different digits, two and three of them.
TEST_P(DigitsTest, Extremes) {
  constexpr int32_t kTwo[] = {255 << 5, (64 << 7) - 64};  // bf16 numbers
  constexpr int32_t kThree[] = {(1 << 20) - 1, (63 << 14) + (63 << 7) + 63};
  for (const std::byte codes : {std::byte{0x77}, std::byte{0xff}, std::byte{0x00}}) {
    const Weights w = MakeWeights(2, 2, codes);
    for (const int sign : {1, -1}) {
      for (const int exponent : {-60, 0, 60}) {
        const auto scaled = [&](int32_t integer) {
          return std::ldexp(static_cast<float>(sign * integer), exponent);
        };
        for (const int32_t integer : kTwo) {
          std::vector<float> a(3 * w.columns, scaled(integer));
          a[w.columns / 4] = scaled(1);  // in one group with the greatest
          EXPECT_EQ(Held(Path::kDigitsOfBf16, a), a);
          CheckProduct(Path::kDigitsOfBf16, w, a);
        }
        for (const int32_t integer : kThree) {
          std::vector<float> a(3 * w.columns, scaled(integer));
          a[w.columns / 4] = scaled(1);
          EXPECT_EQ(Held(Path::kDigits, a), a);
          CheckProduct(Path::kDigits, w, a);
        }
      }
    }
  }
}

// Integers of 21 bits times powers of two, down to the least power that a group is rounded to.
TEST_P(DigitsTest, TinyActivations) {
  const Weights w = MakeWeights(2, 3);
  for (const int exponent : {-100, -126, -127, -140, -148}) {
    for (const int32_t greatest : {(1 << 20) - 1, 21, 1}) {
      std::vector<float> a(3 * w.columns);
      for (size_t i = 0; i < a.size(); ++i) {
        const auto integer = static_cast<float>(greatest - static_cast<int32_t>(i % 2 * greatest));
        a[i] = std::ldexp(i % 3 == 0 ? -integer : integer, exponent);
      }
      for (const Path path : {Path::kDigits, Path::kDigitsOfBf16}) {
        if (path == Path::kDigitsOfBf16 && (greatest > 255 || exponent < -133)) continue;
        CheckSums(w, a, Multiply(path, w, a), static_cast<double>(w.columns) * 0x1p-149);
      }
    }
  }
}

// Groups on both sides of the rule that decides between two digits and three.
TEST_P(DigitsTest, BesideAnOutlier) {
  const Weights w = MakeWeights(2, 4);
  const int64_t group = w.columns / 4;
  for (const float others : {0x1.fcp-2f, 0x1p-1f, 0x1.02p-1f}) {  // with 1/2 twice its greatest
    std::vector<float> a(w.columns, 0);
    for (int64_t i = 0; i < w.columns; i += group) {
      a[i] = a[i + 1] = 0.5f;
      a[i + 2] = others;
      a[i + 3] = 0x1.8p-14f;  // three quarters of 2^-13
    }
    CheckProduct(Path::kDigitsOfBf16, w, a);
  }
}

// More tokens than a group is decoded for at once, and more than whole rows are multiplied for.
TEST_P(DigitsTest, ManyTokens) {
  const Weights w = MakeWeights(2, 19);
  for (const int64_t tokens : {33, 128, 129, 300}) {
    CheckProduct(Path::kDigitsOfBf16, w, MakeActivations(tokens * w.columns));
  }
}

// A lone infinity in a group keeps its sign. NaN or several infinities make the group NaN. Neither
// changes the sums of other groups or tokens.
TEST_P(DigitsTest, NotFinite) {
  const Weights w = MakeWeights(1, 3, std::byte{0x22});  // no weight is zero
  const std::vector<float> ones(2 * w.columns, 1.0f);
  for (const float special : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> a = ones;
    a[w.columns / 2] = special;
    std::vector<float> c = Multiply(Path::kDigits, w, a);
    for (int64_t row = 0; row < kTileRows; ++row) {
      if (std::isnan(special)) {
        EXPECT_TRUE(std::isnan(c[row])) << c[row];
      } else {
        const auto weight = static_cast<float>(w.values[row * w.columns + w.columns / 2]);
        EXPECT_EQ(c[row], special * weight);
      }
      EXPECT_TRUE(std::isfinite(c[kTileRows + row]));
    }
    a[w.columns / 2 + 1] = special;
    c = Multiply(Path::kDigits, w, a);
    EXPECT_TRUE(std::isnan(c[0])) << c[0];
  }
}

bool SameBits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

// A token's sums are bit-identical alone and beside any others, with one tile and with two.
TEST_P(GemmTest, ATokensSumsDoNotDependOnItsNeighbours) {
  const int64_t most = 2 * kernels().panel_tokens + 1;  // at least fused_tokens
  const Weights w = MakeWeights(2, 5);
  const std::vector<float> a = MakeActivations(most * w.columns);
  std::vector<Path> paths = PathsFor(1);
  if (kernels().int8) paths.push_back(Path::kInt8);
  for (const Path path : paths) {
    std::vector<float> alone;  // [tokens, rows]
    for (int64_t t = 0; t < most; ++t) {
      const std::vector<float> row =
          Multiply(path, w, {a.begin() + t * w.columns, a.begin() + (t + 1) * w.columns});
      alone.insert(alone.end(), row.begin(), row.end());
    }
    const int64_t limit = path == Path::kFused ? kernels().fused_tokens : most;
    for (int64_t tokens = 1; tokens <= limit; ++tokens) {
      const std::vector<float> some(a.begin(), a.begin() + tokens * w.columns);
      EXPECT_TRUE(SameBits(Multiply(path, w, some).data(), alone.data(), tokens * w.rows()))
          << tokens << " tokens, path " << static_cast<int>(path);
      Weights first = w;
      first.tiles = {w.tiles[0]};
      const std::vector<float> c = Multiply(path, first, some);
      for (int64_t t = 0; t < tokens; ++t) {
        EXPECT_TRUE(SameBits(&c[t * kTileRows], &alone[t * w.rows()], kTileRows)) << t;
      }
    }
  }
}

// The fused kernel and the scaled panel kernel add in one order when vector instructions do both,
// so their sums are bit-identical.
TEST_P(GemmTest, FusedEqualsScaledPanel) {
  if (kernels().panel_unit) GTEST_SKIP() << "a unit of " << GetParam().isa << " multiplies panels";
  if (!kernels().scales_sums) GTEST_SKIP() << "scales of " << format() << " always fold";
  const Weights w = MakeWeights(2, kernels().panel_groups + 1);
  for (int64_t tokens = 1; tokens <= kernels().fused_tokens; ++tokens) {
    const std::vector<float> a = MakeActivations(tokens * w.columns);
    const std::vector<float> fused = Multiply(Path::kFused, w, a);
    const std::vector<float> panel = Multiply(Path::kScaledPanel, w, a);
    EXPECT_TRUE(SameBits(fused.data(), panel.data(), tokens * w.rows())) << tokens << " tokens";
  }
}

}  // namespace
}  // namespace cpumoe
