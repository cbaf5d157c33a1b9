// f of a gated linear unit in double precision, and what bounds on errors need to know about it.
#pragma once

#include <algorithm>
#include <cmath>

#include "moe/config.h"

namespace cpumoe {

// z of f(g) = g * sigmoid(z); 0 for functions of another form.
inline double SigmoidArgument(const Glu& glu, double g) {
  switch (glu.function) {
    case GluFunction::kSilu:
      return static_cast<double>(glu.alpha) * g;
    case GluFunction::kSoftCappedSilu:
      return g;
    case GluFunction::kGeluTanh:
      return 2.0 * std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g);
    default:
      return 0.0;
  }
}

inline double SoftCap(double x, double cap) { return cap * std::tanh(x / cap); }

inline double ReferenceGate(const Glu& glu, double g) {
  const double relu = g < 0 ? 0.0 : g;  // keeps NaN
  switch (glu.function) {
    case GluFunction::kRelu:
      return relu;
    case GluFunction::kRelu2:
      return relu * relu;
    case GluFunction::kSoftCappedSilu:
      return SoftCap(g, glu.gate_cap) / (1.0 + std::exp(-g));
    case GluFunction::kGelu:
      return g * std::erfc(-g * M_SQRT1_2) / 2.0;
    default:
      return g / (1.0 + std::exp(-SigmoidArgument(glu, g)));
  }
}

// The factor of f(g), from a clamped u.
inline double ReferenceUp(const Glu& glu, double u) {
  if (!glu.gated) return 1.0;
  return (glu.function == GluFunction::kSoftCappedSilu ? SoftCap(u, glu.up_cap) : u) +
         glu.up_offset;
}

// The greatest slope of f within `distance` of g. The slope of g * sigmoid(alpha g) is below 1.1
// for every alpha, and that of both forms of GELU is below 1.13.
inline double GreatestSlope(const Glu& glu, double g, double distance) {
  switch (glu.function) {
    case GluFunction::kSilu:
    case GluFunction::kSoftCappedSilu:
      return 1.1;
    case GluFunction::kGelu:
    case GluFunction::kGeluTanh:
      return 1.13;
    case GluFunction::kRelu:
      return 1.0;
    case GluFunction::kRelu2:
      return 2.0 * std::max(g + distance, 0.0);
  }
  return NAN;
}

// A bound on the relative error of h = (u + up_offset) * f(g) in fp32, in units of roundoff.
// Rounding the sigmoid's argument moves the exponential by |z| units for each rounding, of which
// kGeluTanh has four. |z| counts up to 104, because beyond that the exponential is 0 or infinite.
// exp adds two units, and each of the other five operations adds one. Two tanh add six units each,
// and their arguments and products two. kGelu has a tail of nine units and three products.
inline double UnitsOfError(const Glu& glu, double g) {
  const double roundings = glu.function == GluFunction::kGeluTanh ? 4.0 : 1.0;
  const double caps = glu.function == GluFunction::kSoftCappedSilu ? 16.0 : 0.0;
  const double tail = glu.function == GluFunction::kGelu ? 4.0 : 0.0;
  return 8 + caps + tail + roundings * std::min(std::fabs(SigmoidArgument(glu, g)), 104.0);
}

}  // namespace cpumoe
