// The golden model, and what a right result may differ from it by. The model computes experts in
// double precision from checkpoint bytes, one token at a time.
//
// The bounds follow the computation step by step, in the usual model. Rounding to p significant
// bits changes a value by at most 2^-p of it. A sum of n terms is off by at most gamma_n of the sum
// of their magnitudes. This is the worst case, and actual errors are some ten times smaller.
#include "cpp/forward_oracle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "base/check.h"
#include "cpp/all_formats.h"
#include "cpp/reference_glu.h"
#include "cpp/reference_weight.h"

namespace cpumoe {
namespace {

constexpr double kUnit = 0x1p-24;    // unit roundoff of fp32
constexpr double kFlush = 0x1p-126;  // VDPBF16PS treats smaller numbers as zero

struct Interval {
  double value;
  double error;
};
using Intervals = std::vector<Interval>;

int SignificandBits(DType dtype) {
  return dtype == DType::kBf16 ? 8 : dtype == DType::kFp16 ? 11 : 24;
}

// Half the distance between subnormals.
double LeastRounding(DType dtype) {
  return dtype == DType::kBf16 ? 0x1p-134 : dtype == DType::kFp16 ? 0x1p-25 : 0x1p-150;
}

// A weight matrix in double precision.
struct Dense {
  int64_t rows, columns;
  std::vector<double> weights;
  double greatest = 0;
};

template <class F>
Dense Decode(const RawMatrix& m) {
  Dense dense{m.rows, m.columns, {}, 0};
  for (int64_t i = 0; i < m.rows * m.columns; ++i) {
    dense.weights.push_back(m.factor * ReferenceWeight<F>(m, i / m.columns, i % m.columns));
    dense.greatest = std::max(dense.greatest, std::fabs(dense.weights.back()));
  }
  return dense;
}

// Adds a row's products to y. Tests under sanitizers would spend half of their time in these
// accesses, which stay within arrays of checked length and are of one thread.
[[gnu::no_sanitize("address", "thread", "undefined")]]
void AddProducts(const double* weights, const Interval* x, int64_t columns, Interval& y,
                 double& magnitude) {
  for (int64_t k = 0; k < columns; ++k) {
    const double size = std::fabs(weights[k]);
    y.value += weights[k] * x[k].value;
    y.error += size * x[k].error;
    magnitude += size * (std::fabs(x[k].value) + x[k].error);
  }
}

// Computes W x + b. A product passes at most K + 2 K / group + 2 roundings, and 3 K covers them. If
// a group's unscaled sum is flushed to zero, the error grows by the scale, which is at most twice
// the greatest weight.
Intervals Multiply(const Dense& w, const Intervals& x, const float* bias) {
  const double n = (3.0 * static_cast<double>(w.columns) + 1) * kUnit;
  const double gamma = n / (1 - n);
  const double flush = static_cast<double>(w.columns) * kFlush * (1 + 4 * w.greatest);
  Intervals y(w.rows);
  Require(x.size() == static_cast<size_t>(w.columns), "x: expected ", w.columns, " elements");
  for (int64_t row = 0; row < w.rows; ++row) {
    y[row] = {bias == nullptr ? 0 : bias[row], 0};
    double magnitude = std::fabs(y[row].value);
    AddProducts(&w.weights[row * w.columns], x.data(), w.columns, y[row], magnitude);
    y[row].error += gamma * magnitude + flush;
  }
  return y;
}

// Adds the error of rounding to int8. The numbers of a group become multiples of 1/127 of the
// greatest magnitude, or zero if that magnitude is tiny.
template <class F>
void RoundToInt8(Intervals& x) {
  for (size_t begin = 0; begin < x.size(); begin += kGroupSize) {
    const size_t end = std::min(begin + kGroupSize, x.size());
    double greatest = 0;
    for (size_t k = begin; k < end; ++k) {
      greatest = std::max(greatest, std::fabs(x[k].value) + x[k].error);
    }
    for (size_t k = begin; k < end; ++k) {
      x[k].error += greatest / 254 * (1 + 0x1p-10) + std::min(greatest, 0x1p-99);
    }
  }
}

// Adds the error of rounding to digits (staging/digits-inl.h). In bf16 calls a group without an
// outlier is off by 2^-13 of its greatest magnitude. All other groups are off by 2^-20 of it.
template <class F>
void RoundToDigits(Intervals& x, DType dtype) {
  for (size_t begin = 0; begin < x.size(); begin += kGroupSize) {
    const size_t end = std::min(begin + kGroupSize, x.size());
    double greatest = 0, least_greatest = 0, sum = 0;
    for (size_t k = begin; k < end; ++k) {
      const double magnitude = std::fabs(x[k].value);
      greatest = std::max(greatest, magnitude + x[k].error);
      least_greatest = std::max(least_greatest, magnitude - x[k].error);
      sum += magnitude + x[k].error;
    }
    // The rule for outliers looks at rounded numbers.
    const bool outlier = dtype != DType::kBf16 || sum * (1 + 0x1p-7) < 3 * least_greatest;
    for (size_t k = begin; k < end; ++k) {
      x[k].error += std::ldexp(greatest, outlier ? -20 : -13) + std::min(greatest, 0x1p-148);
    }
  }
}

// Computes (u + offset) * f(g). min, clamp and caps have slopes of at most 1.
Interval Activate(const Glu& s, Interval gate, Interval up, int bits) {
  const double g = std::min<double>(gate.value, s.limit);
  const double u = ReferenceUp(s, std::clamp<double>(up.value, -s.limit, s.limit));
  const double f = ReferenceGate(s, g);
  const double moved = GreatestSlope(s, g, gate.error) * gate.error;
  const double f_error =
      moved + UnitsOfError(s, g) * kUnit * (std::fabs(f) + moved) + std::fabs(g) * kFlush;
  const double u_error = s.gated ? up.error + kUnit * (std::fabs(u) + up.error) : 0.0;
  const double h = u * f;
  double error = std::fabs(u) * f_error + std::fabs(f) * u_error + f_error * u_error;
  error += (kUnit + std::ldexp(1.0, -bits)) * (std::fabs(h) + error) + kFlush;
  return {h, error};
}

template <class F>
class Oracle {
 public:
  Oracle(const TestLayer& layer, const Batch& batch, Rounding rounding)
      : layer_(layer), batch_(batch), rounding_(rounding), experts_(layer.config().num_experts) {}

  Expectation Run() {
    Expectation all;
    for (int64_t t = 0; t < batch_.spec().tokens; ++t) {
      for (const Interval& y : Token(t)) {
        all.values.push_back(y.value);
        all.bounds.push_back(y.error);
      }
    }
    return all;
  }

 private:
  Intervals Token(int64_t token) {
    const MoeConfig& config = layer_.config();
    const Intervals x = Input(token);
    Intervals sum(config.hidden_size, {0, 0});
    std::vector<double> magnitude(config.hidden_size, 0);
    double terms = 0;
    const int64_t top_k = batch_.spec().top_k;
    for (int64_t i = token * top_k; i < (token + 1) * top_k; ++i) {
      const int64_t id = batch_.ids[i];
      if (id == -1 || id == config.num_experts) continue;
      if (!batch_.mask.empty() && batch_.mask[id] != 0) continue;
      const double weight = batch_.weights[i];
      ++terms;
      const Intervals y = Expert(id, x);
      for (int64_t r = 0; r < config.hidden_size; ++r) {
        sum[r].value += weight * y[r].value;
        sum[r].error += std::fabs(weight) * y[r].error;
        magnitude[r] += std::fabs(weight) * (std::fabs(y[r].value) + y[r].error);
      }
    }
    const DType dtype = batch_.spec().dtype;
    for (int64_t r = 0; r < config.hidden_size; ++r) {
      sum[r].error += (terms + 1) * kUnit * magnitude[r];
      const double largest = std::fabs(sum[r].value) + sum[r].error;
      sum[r].error += std::ldexp(largest, -SignificandBits(dtype)) + LeastRounding(dtype);
    }
    return sum;
  }

  // The hidden state of a token, as the kernels round it.
  Intervals Input(int64_t token) const {
    const bool rounded = SignificandBits(batch_.spec().dtype) > Bits();
    Intervals x;
    for (int64_t k = 0; k < layer_.config().hidden_size; ++k) {
      const double value = batch_.HiddenState(token, k);
      x.push_back({value, rounded ? std::ldexp(std::fabs(value), -Bits()) : 0.0});
    }
    Round(x);
    return x;
  }

  // One expert's output [hidden_size] for one token x [hidden_size].
  Intervals Expert(int64_t id, const Intervals& x) {
    const ExpertSource source = layer_.Source(id);
    std::vector<Dense>& expert = experts_[id];
    if (expert.empty()) {
      // Without a gate projection, the gate is up.
      const RawMatrix& gate = layer_.config().glu.gated ? source.gate : source.up;
      expert = {Decode<F>(gate), Decode<F>(source.up), Decode<F>(source.down)};
    }
    const bool gated = layer_.config().glu.gated;
    const Intervals gate = Multiply(expert[0], x, gated ? source.gate_bias : source.up_bias);
    const Intervals up = Multiply(expert[1], x, source.up_bias);
    Intervals h;
    for (size_t i = 0; i < gate.size(); ++i) {
      h.push_back(Activate(layer_.config().glu, gate[i], up[i], Bits()));
    }
    Round(h);
    return Multiply(expert[2], h, source.down_bias);
  }

  void Round(Intervals& x) const {
    if (rounding_.int8) {
      RoundToInt8<F>(x);
    } else if (rounding_.as_digits) {
      RoundToDigits<F>(x, batch_.spec().dtype);
    }
  }

  // Significant bits of a rounded activation.
  int Bits() const { return rounding_.int8 ? 24 : rounding_.bits; }

  const TestLayer& layer_;
  const Batch& batch_;
  const Rounding rounding_;
  std::vector<std::vector<Dense>> experts_;  // gate, up, down of each expert used so far
};

}  // namespace

Expectation Expect(const TestLayer& layer, const Batch& batch, Rounding rounding) {
  return VisitFormat(layer.format(),
                     [&]<class F>(F) { return Oracle<F>(layer, batch, rounding).Run(); });
}

void ExpectClose(const Expectation& expected, const std::vector<double>& actual, int64_t hidden) {
  ASSERT_EQ(actual.size(), expected.values.size());
  size_t worst = 0;
  double worst_share = -1;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(actual[i] - expected.values[i]);
    const double share = std::isfinite(error) ? error / expected.bounds[i] : INFINITY;
    if (share > worst_share) worst = i, worst_share = share;
  }
  EXPECT_LE(worst_share, 1.0) << "worst element [" << worst / hidden << ", " << worst % hidden
                              << "]: expected " << expected.values[worst] << ", got "
                              << actual[worst] << ", bound " << expected.bounds[worst];
}

}  // namespace cpumoe
