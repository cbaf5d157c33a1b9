// The activation of 16 intermediate features (formulas: moe/config.h).
#pragma once

#include <type_traits>

#include "kernels/exp-inl.h"
#include "kernels/normal_tail-inl.h"
#include "kernels/tanh-inl.h"
#include "moe/config.h"

namespace cpumoe {

// Calls body(std::integral_constant<GluFunction, function>).
template <class Body>
inline __attribute__((always_inline)) void VisitGluFunction(GluFunction function, Body&& body) {
  switch (function) {
    case GluFunction::kSilu:
      return body(std::integral_constant<GluFunction, GluFunction::kSilu>{});
    case GluFunction::kGeluTanh:
      return body(std::integral_constant<GluFunction, GluFunction::kGeluTanh>{});
    case GluFunction::kRelu:
      return body(std::integral_constant<GluFunction, GluFunction::kRelu>{});
    case GluFunction::kRelu2:
      return body(std::integral_constant<GluFunction, GluFunction::kRelu2>{});
    case GluFunction::kSoftCappedSilu:
      return body(std::integral_constant<GluFunction, GluFunction::kSoftCappedSilu>{});
    case GluFunction::kGelu:
      return body(std::integral_constant<GluFunction, GluFunction::kGelu>{});
  }
}

// x * sigmoid(-minus_z). -inf * sigmoid(-inf) is NaN, as in PyTorch's silu and gelu.
template <class Isa>
typename Isa::Vec TimesSigmoid(typename Isa::Vec x, typename Isa::Vec minus_z) {
  return Isa::Div(x, Isa::Add(Isa::Broadcast(1.0f), Exp<Isa>(minus_z)));
}

template <class Isa>
typename Isa::Vec SoftCap(typename Isa::Vec x, float cap) {
  return Isa::Mul(Isa::Broadcast(cap), Tanh<Isa>(Isa::Div(x, Isa::Broadcast(cap))));
}

// x * Phi(x). -inf * Phi(-inf) is NaN, as in TimesSigmoid.
template <class Isa>
typename Isa::Vec TimesNormalCdf(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  const Vec tail = NormalTail<Isa>(x);
  const Vec rest = Isa::Fma(tail, Isa::Broadcast(-1.0f), Isa::Broadcast(1.0f));
  return Isa::Fma(Isa::Max(Isa::Zero(), x), rest, Isa::Mul(Isa::Min(Isa::Zero(), x), tail));
}

template <class Isa, GluFunction kFunction>
typename Isa::Vec GateOf(const Glu& glu, typename Isa::Vec g) {
  using Vec = typename Isa::Vec;
  if constexpr (kFunction == GluFunction::kSilu) {
    return TimesSigmoid<Isa>(g, Isa::Mul(g, Isa::Broadcast(-glu.alpha)));
  } else if constexpr (kFunction == GluFunction::kGeluTanh) {
    constexpr float kLinear = 1.5957691216057308f;  // 2 sqrt(2/pi)
    constexpr float kCubic = kLinear * 0.044715f;
    const Vec factor = Isa::Fma(Isa::Mul(g, g), Isa::Broadcast(-kCubic), Isa::Broadcast(-kLinear));
    return TimesSigmoid<Isa>(g, Isa::Mul(g, factor));
  } else if constexpr (kFunction == GluFunction::kGelu) {
    return TimesNormalCdf<Isa>(g);
  } else if constexpr (kFunction == GluFunction::kSoftCappedSilu) {
    return TimesSigmoid<Isa>(SoftCap<Isa>(g, glu.gate_cap), Isa::Mul(g, Isa::Broadcast(-1.0f)));
  } else {
    const Vec relu = Isa::Max(Isa::Zero(), g);
    return kFunction == GluFunction::kRelu ? relu : Isa::Mul(relu, relu);
  }
}

// h of experts without a gate projection.
template <class Isa, GluFunction kFunction>
typename Isa::Vec Activate(const Glu& glu, typename Isa::Vec up) {
  return GateOf<Isa, kFunction>(glu, Isa::Min(Isa::Broadcast(glu.limit), up));
}

// NaN and infinities give the results of PyTorch's functions and clamp: Min and Max keep a NaN in
// their second operand.
template <class Isa, GluFunction kFunction>
typename Isa::Vec Activate(const Glu& glu, typename Isa::Vec gate, typename Isa::Vec up) {
  using Vec = typename Isa::Vec;
  const Vec limit = Isa::Broadcast(glu.limit);
  const Vec g = Isa::Min(limit, gate);
  Vec u = Isa::Max(Isa::Broadcast(-glu.limit), Isa::Min(limit, up));
  if constexpr (kFunction == GluFunction::kSoftCappedSilu) u = SoftCap<Isa>(u, glu.up_cap);
  return Isa::Mul(GateOf<Isa, kFunction>(glu, g), Isa::Add(u, Isa::Broadcast(glu.up_offset)));
}

}  // namespace cpumoe
