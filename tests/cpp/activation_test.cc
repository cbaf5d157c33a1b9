// Compares the vector exp and the gated activation of every ISA with double precision.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "base/bits.h"
#include "cpp/isa_test.h"
#include "cpp/reference_glu.h"
#include "kernels/tile.h"
#include "moe/config.h"

namespace cpumoe {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;             // unit roundoff of fp32
constexpr double kLeast = 0x1p-149;           // the least subnormal fp32
constexpr double kOverflow = 0x1.ffffffp127;  // from here on, results round to infinity

class ActivationTest : public IsaTest {
 protected:
  std::vector<float> Exp(std::vector<float> x) const {
    const size_t count = x.size();
    x.resize(RoundUp(static_cast<int64_t>(count), kTileRows));
    std::vector<float> y(x.size());
    run_.probe().exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
    y.resize(count);
    return y;
  }

  std::vector<float> Activate(const Glu& glu, std::vector<float> gate,
                              std::vector<float> up) const {
    const size_t count = gate.size();
    gate.resize(RoundUp(static_cast<int64_t>(count), kTileRows));
    up.resize(gate.size());
    std::vector<float> y(gate.size());
    run_.probe().activate(glu, gate.data(), up.data(), y.data(), static_cast<int64_t>(gate.size()));
    y.resize(count);
    return y;
  }
};
CPUMOE_FOR_EACH_ISA(ActivationTest);

// The relative error is within 2^-23 if the result is normal. Below, the error is within one unit
// of the last place.
void CheckExp(float x, float actual) {
  const double expected = std::exp(static_cast<double>(x));
  if (std::isnan(x)) {
    ASSERT_TRUE(std::isnan(actual));
  } else if (expected >= kOverflow) {
    ASSERT_EQ(actual, kInfinity) << x;
  } else {
    ASSERT_NEAR(actual, expected, std::max(2 * kUnit * expected, kLeast)) << std::hexfloat << x;
  }
}

TEST_P(ActivationTest, ExpOfADenseRange) {
  std::vector<float> x;
  for (float value = -110.0f; value < 100.0f; value += 0x1p-10f) x.push_back(value);
  const std::vector<float> y = Exp(x);
  for (size_t i = 0; i < x.size(); ++i) CheckExp(x[i], y[i]);
}

TEST_P(ActivationTest, ExpOfAnyFloat) {
  std::vector<float> x = {0.0f,
                          -0.0f,
                          kInfinity,
                          -kInfinity,
                          kNan,
                          -kNan,
                          -1e30f,
                          1e30f,
                          -87.33f,
                          -88.f,
                          -103.97f,
                          -104.0f,
                          -110.0f,
                          88.7f,
                          88.73f,
                          100.f,
                          0x1p-149f,
                          -0x1p-149f,
                          std::numeric_limits<float>::max(),
                          std::numeric_limits<float>::lowest()};
  constexpr uint32_t kStep = 10007;  // a prime, so that the low bits have no pattern
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += kStep) {
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  const std::vector<float> y = Exp(x);
  for (size_t i = 0; i < x.size(); ++i) CheckExp(x[i], y[i]);
}

// The relative error is within 10 units of roundoff. A tail below the normal range adds one unit of
// its last place times g.
void CheckGelu(float g, float actual) {
  const double expected = ReferenceGate({.function = GluFunction::kGelu}, g);
  if (std::isnan(expected)) {
    ASSERT_TRUE(std::isnan(actual)) << g;
  } else if (std::isinf(g)) {
    ASSERT_EQ(actual, g);
  } else {
    const double tail = std::min(std::fabs(static_cast<double>(g)), 14.5) + 1;
    ASSERT_NEAR(actual, expected, 10 * kUnit * std::fabs(expected) + tail * kLeast)
        << std::hexfloat << g;
  }
}

TEST_P(ActivationTest, ExactGeluOfADenseRange) {
  std::vector<float> g;
  for (float value = -15.0f; value < 15.0f; value += 0x1.3p-12f) g.push_back(value);
  const Glu gelu = {.function = GluFunction::kGelu};
  const std::vector<float> f = Activate(gelu, g, std::vector(g.size(), 1.0f));
  for (size_t i = 0; i < g.size(); ++i) CheckGelu(g[i], f[i]);
}

TEST_P(ActivationTest, ExactGeluOfAnyFloat) {
  std::vector<float> g = {0.0f, -0.0f, kInfinity, -kInfinity, kNan, -kNan, -14.5f, -13.2f};
  constexpr uint32_t kStep = 10007;
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += kStep) {
    g.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  const Glu gelu = {.function = GluFunction::kGelu};
  const std::vector<float> f = Activate(gelu, g, std::vector(g.size(), 1.0f));
  for (size_t i = 0; i < g.size(); ++i) CheckGelu(g[i], f[i]);
}

// The activations of known checkpoints, and one with unusual values of all parameters.
constexpr Glu kVariants[] = {
    {},
    {.limit = 10.0f},
    {.alpha = 1.702f, .limit = 7.0f, .up_offset = 1.0f},
    {.alpha = 0.3f, .limit = 2.5f, .up_offset = -0.25f},
    {.function = GluFunction::kGeluTanh},
    {.function = GluFunction::kGeluTanh, .limit = 3.0f},
    {.function = GluFunction::kGelu},
    {.function = GluFunction::kGelu, .limit = 3.0f, .up_offset = 1.0f},
    {.function = GluFunction::kRelu},
    {.function = GluFunction::kSoftCappedSilu, .gate_cap = 4.0f, .up_cap = 25.0f},
    {.function = GluFunction::kRelu2},
    {.function = GluFunction::kRelu2, .limit = 9.0f, .up_offset = 1.0f}};

double Clamp(double x, double limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// Checks (u + offset) * f(g). An fp32 exp overflows where a double does not. There, and in the
// subnormals, the result is only near zero.
void CheckActivation(const Glu& s, float gate, float up, float actual) {
  const double g = std::min<double>(gate, s.limit);
  const double u = ReferenceUp(s, Clamp(up, s.limit));
  const double expected = u * ReferenceGate(s, g);
  const double units = UnitsOfError(s, g);
  // The sum u + offset can cancel. Its rounding error is one unit of the sum itself.
  const double bound = units * kUnit * std::fabs(expected) +
                       std::fabs(u) * (std::fabs(g) / 0x1p127 + kLeast) + kLeast;
  if (std::fabs(expected) >= kOverflow * (1 - units * kUnit)) {
    ASSERT_GE(std::fabs(actual), std::numeric_limits<float>::max() * (1 - units * kUnit));
    ASSERT_EQ(std::signbit(actual), std::signbit(expected));
  } else {
    ASSERT_NEAR(actual, expected, bound) << "gate " << gate << ", up " << up;
  }
}

TEST_P(ActivationTest, GatedActivation) {
  for (const Glu& variant : kVariants) {
    std::vector<float> gate, up;
    for (float g = -120.0f; g <= 120.0f; g += 0x1.3p-4f) {
      for (const float u : {-1e4f, -11.0f, -1.0f, -0.5f, -0.0f, 0.1f, 3.0f, 7.5f, 1e30f}) {
        gate.push_back(g);
        up.push_back(u);
      }
    }
    for (const float g : {-1e30f, 1e30f, 0.0f, -0.0f, 0x1p-149f, -0x1p-130f}) {
      gate.push_back(g);
      up.push_back(2.0f);
    }
    const std::vector<float> h = Activate(variant, gate, up);
    for (size_t i = 0; i < h.size(); ++i) CheckActivation(variant, gate[i], up[i], h[i]);
  }
}

// Results as in PyTorch: clamp(max=limit) and clamp(-limit, limit) keep NaN, silu(-inf) and
// gelu(-inf) are NaN, relu(-inf) is zero, and f(inf) is inf.
TEST_P(ActivationTest, InfinitiesAndNans) {
  for (const Glu& variant : kVariants) {
    const bool limited = variant.limit < kInfinity;
    const std::vector<float> gate = {kNan, 1.0f, kNan, -kInfinity, kInfinity, 1.0f, 1.0f};
    const std::vector<float> up = {1.0f, kNan, kNan, 1.0f, 1.0f, kInfinity, -kInfinity};
    const std::vector<float> h = Activate(variant, gate, up);
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(h[i])) << i << ": " << h[i];
    if (std::isnan(ReferenceGate(variant, -kInfinity))) {
      EXPECT_TRUE(std::isnan(h[3])) << h[3];
    } else {
      EXPECT_EQ(h[3], 0.0f);
    }
    if (limited) {
      const float limit = variant.limit;
      const std::vector<float> clamped =
          Activate(variant, {limit, 1.0f, 1.0f}, {1.0f, limit, -limit});
      for (int i = 0; i < 3; ++i) EXPECT_EQ(h[4 + i], clamped[i]);
    } else if (variant.function == GluFunction::kSoftCappedSilu) {
      for (int i = 4; i < 7; ++i) CheckActivation(variant, gate[i], up[i], h[i]);
    } else {
      EXPECT_EQ(h[4], kInfinity);
      EXPECT_EQ(h[5], kInfinity);
      EXPECT_EQ(h[6], -kInfinity);
    }
  }
}

}  // namespace
}  // namespace cpumoe
