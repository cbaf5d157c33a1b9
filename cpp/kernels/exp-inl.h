// exp for any fp32. It saturates correctly, propagates NaN, and has a relative error within 1 ulp
// of 2^-23.
#pragma once

namespace cpumoe {

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. exp(r) is its Taylor series up to
// r^7 (the next term is below 2^-27). ln 2 is subtracted in two parts (Cody and Waite), so that r
// keeps its bits. The clamps change no result, because exp overflows to +inf and underflows to 0
// before them.
template <class Isa>
typename Isa::Vec Exp(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  x = Isa::Max(Isa::Broadcast(-110.0f), Isa::Min(Isa::Broadcast(100.0f), x));
  const Vec n = Isa::Round(Isa::Mul(x, Isa::Broadcast(0x1.715476p+0f)));
  Vec r = Isa::Fma(n, Isa::Broadcast(-0x1.62e400p-1f), x);
  r = Isa::Fma(n, Isa::Broadcast(-0x1.7f7d1cp-20f), r);
  Vec sum = Isa::Broadcast(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = Isa::Fma(sum, r, Isa::Broadcast(coefficient));
  }
  return Isa::Ldexp(sum, n);
}

}  // namespace cpumoe
