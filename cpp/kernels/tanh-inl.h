// tanh of a vector.
#pragma once

namespace cpumoe {

// Returns tanh(x) with a relative error of at most 6 * 2^-24; NaN stays NaN. The magnitude may
// exceed 1 by this error.
//
// tanh(x) / x is a quotient of two polynomials in x^2, whose coefficients minimise the greatest
// relative error for |x| <= 9.02. Beyond, tanh(x) rounds to 1 or -1.
template <class Isa>
typename Isa::Vec Tanh(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  constexpr float kGreatest = 9.02f;
  constexpr float kP[] = {0.9999999790110153f, 0.1337971749320953f, 0.003494034051085006f,
                          2.0583473642065797e-05f, 1.3319062493394106e-08f};
  constexpr float kQ[] = {1.0f, 0.46713032732083737f, 0.025871071208292497f, 0.0003283092041820157f,
                          7.762015355691359e-07f};
  const Vec bounded = Isa::Max(Isa::Broadcast(-kGreatest), Isa::Min(Isa::Broadcast(kGreatest), x));
  const Vec square = Isa::Mul(bounded, bounded);
  Vec p = Isa::Broadcast(kP[4]), q = Isa::Broadcast(kQ[4]);
  for (int i = 3; i >= 0; --i) {
    p = Isa::Fma(p, square, Isa::Broadcast(kP[i]));
    q = Isa::Fma(q, square, Isa::Broadcast(kQ[i]));
  }
  return Isa::Div(Isa::Mul(bounded, p), q);
}

}  // namespace cpumoe
