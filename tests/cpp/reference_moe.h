// The golden model, with which tests compare the kernels. It computes experts in double precision,
// one weight at a time, from checkpoint bytes. It shares only the formats' scalar definitions with
// the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpp/reference_glu.h"
#include "formats/weight_format.h"
#include "moe/config.h"
#include "moe/moe.h"

namespace cpumoe {

template <WeightFormat F>
class ReferenceMoe {
 public:
  ReferenceMoe(const MoeConfig& config, std::vector<ExpertSource> experts)
      : config_(config), experts_(std::move(experts)) {}

  // A weight without the matrix's factor.
  static double Weight(const RawMatrix& m, int64_t row, int64_t column) {
    const std::byte* codes = m.codes + row * m.codes_stride;
    const int64_t bit = column * F::kCodeBits;
    uint32_t word = 0;
    std::memcpy(&word, codes + bit / 8, (F::kCodeBits + 7) / 8);
    const uint32_t code = (word >> (bit % 8)) & ((uint64_t{1} << F::kCodeBits) - 1);
    if constexpr (HasScales<F>) {
      const std::byte* scales = m.scales + row / m.grid.rows * m.scales_stride;
      return VisitScaleType<typename F::Scale>(m.grid.type, [&]<class Stored>(Stored scale) {
        std::memcpy(&scale, scales + column / m.grid.depth * sizeof(scale), sizeof(scale));
        return static_cast<double>(F::Decode(code)) * scale.ToFloat();
      });
    } else {
      return F::Decode(code);
    }
  }

  // One expert's output [hidden_size] for one token x [hidden_size].
  std::vector<double> Expert(int64_t id, const std::vector<double>& x) const {
    const ExpertSource& e = experts_[id];
    const std::vector<double> up = Multiply(e.up, x, e.up_bias);
    const std::vector<double> gate = config_.glu.gated ? Multiply(e.gate, x, e.gate_bias) : up;
    std::vector<double> h(gate.size());
    for (size_t i = 0; i < h.size(); ++i) h[i] = Activate(gate[i], up[i]);
    return Multiply(e.down, h, e.down_bias);
  }

  double Activate(double gate, double up) const {
    const Glu& s = config_.glu;
    const double g = gate > s.limit ? s.limit : gate;
    const double u = up > s.limit ? s.limit : (up < -s.limit ? -s.limit : up);
    return ReferenceUp(s, u) * ReferenceGate(s, g);
  }

 private:
  static std::vector<double> Multiply(const RawMatrix& m, const std::vector<double>& x,
                                      const float* bias) {
    std::vector<double> y(m.rows);
    for (int64_t row = 0; row < m.rows; ++row) {
      double sum = bias == nullptr ? 0.0 : bias[row];
      for (int64_t k = 0; k < m.columns; ++k) sum += m.factor * Weight(m, row, k) * x[k];
      y[row] = sum;
    }
    return y;
  }

  MoeConfig config_;
  std::vector<ExpertSource> experts_;
};

}  // namespace cpumoe
