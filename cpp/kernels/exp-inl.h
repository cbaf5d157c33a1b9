// exp for any fp32. It saturates correctly, propagates NaN, and has a relative error within 1 ulp
// of 2^-23.
#pragma once

namespace cpumoe {

// x = n ln 2 + rest, |rest| <= ln(2) / 2.
template <class Isa>
struct ExpArgument {
  typename Isa::Vec n, rest;
};

// n = round(x / ln 2). ln 2 is subtracted in two parts (Cody and Waite), so that the rest keeps its
// bits.
template <class Isa>
ExpArgument<Isa> ReduceExpArgument(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  const Vec n = Isa::Round(Isa::Mul(x, Isa::Broadcast(0x1.715476p+0f)));
  const Vec rest = Isa::Fma(n, Isa::Broadcast(-0x1.62e400p-1f), x);
  return {n, Isa::Fma(n, Isa::Broadcast(-0x1.7f7d1cp-20f), rest)};
}

// 2^n * exp(rest), |rest| <= 0.38. exp(rest) is its Taylor series up to rest^7 (the next term is
// below 2^-26).
template <class Isa>
typename Isa::Vec ExpOfReduced(ExpArgument<Isa> x) {
  typename Isa::Vec sum = Isa::Broadcast(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = Isa::Fma(sum, x.rest, Isa::Broadcast(coefficient));
  }
  return Isa::Ldexp(sum, x.n);
}

// The clamps change no result, because exp overflows to +inf and underflows to 0 before them.
template <class Isa>
typename Isa::Vec Exp(typename Isa::Vec x) {
  x = Isa::Max(Isa::Broadcast(-110.0f), Isa::Min(Isa::Broadcast(100.0f), x));
  return ExpOfReduced<Isa>(ReduceExpArgument<Isa>(x));
}

}  // namespace cpumoe
