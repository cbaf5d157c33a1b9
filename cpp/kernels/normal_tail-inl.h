// The upper tail of the standard normal distribution.
#pragma once

#include "kernels/exp-inl.h"

namespace cpumoe {

// Returns Q(|x|), the probability that a standard normal number exceeds |x|, with a relative error
// of at most 9 * 2^-24 plus the least subnormal number; NaN stays NaN.
//
// Q(t) exp(t^2 / 2) is smooth, and falls from 1/2 towards 1 / (t sqrt(2 pi)). A quotient
// of two polynomials is within 0.1 * 2^-24 of it for t <= 14.5. The coefficients are positive, so
// that no sum cancels. Beyond 14.5, Q(t) rounds to 0.
//
// t^2 / 2 is up to 105. If it were rounded, exp would have up to 105 units of roundoff. t therefore
// is split into a multiple of 1/256, whose square is exact, and a rest of at most 1/512.
template <class Isa>
typename Isa::Vec NormalTail(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  constexpr float kGreatest = 14.5f;
  constexpr float kP[] = {0.50000000292747378f, 0.43829319086296444f, 0.1832336409043951f,
                          0.040632664481097775f, 0.0041162079475752795f};
  constexpr float kR[] = {1.0f,
                          1.6744713618634238f,
                          1.2024973452492225f,
                          0.46946662413200978f,
                          0.10185743263273389f,
                          0.01031768348614887f};
  const Vec magnitude = Isa::Max(Isa::Mul(x, Isa::Broadcast(-1.0f)), x);
  const Vec t = Isa::Min(Isa::Broadcast(kGreatest), magnitude);
  Vec p = Isa::Broadcast(kP[4]), r = Isa::Broadcast(kR[5]);
  for (int i = 3; i >= 0; --i) p = Isa::Fma(p, t, Isa::Broadcast(kP[i]));
  for (int i = 4; i >= 0; --i) r = Isa::Fma(r, t, Isa::Broadcast(kR[i]));

  // -t^2 / 2 = -coarse^2 / 2 + (coarse - t) / 2 * (coarse + t)
  const Vec steps = Isa::Round(Isa::Mul(t, Isa::Broadcast(256.0f)));
  const Vec coarse = Isa::Mul(steps, Isa::Broadcast(1.0f / 256));
  const Vec half_rest = Isa::Fma(t, Isa::Broadcast(-0.5f), Isa::Mul(coarse, Isa::Broadcast(0.5f)));
  auto argument = ReduceExpArgument<Isa>(Isa::Mul(Isa::Mul(coarse, coarse), Isa::Broadcast(-0.5f)));
  argument.rest = Isa::Fma(half_rest, Isa::Add(coarse, t), argument.rest);
  return Isa::Mul(ExpOfReduced<Isa>(argument), Isa::Div(p, r));
}

}  // namespace cpumoe
