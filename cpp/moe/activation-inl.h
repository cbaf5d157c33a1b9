// The gated activation of 16 intermediate features (formula: moe/config.h).
#pragma once

#include "kernels/exp-inl.h"
#include "moe/config.h"

namespace cpumoe {

// NaN and infinities give the results of PyTorch's silu and clamp: Min and Max keep a NaN in their
// second operand, and -inf * sigmoid(-inf) is NaN.
template <class Isa>
typename Isa::Vec Activate(const SwiGlu& swiglu, typename Isa::Vec gate, typename Isa::Vec up) {
  using Vec = typename Isa::Vec;
  const Vec limit = Isa::Broadcast(swiglu.limit);
  const Vec g = Isa::Min(limit, gate);
  const Vec u = Isa::Max(Isa::Broadcast(-swiglu.limit), Isa::Min(limit, up));
  const Vec e = Exp<Isa>(Isa::Mul(g, Isa::Broadcast(-swiglu.alpha)));
  const Vec silu = Isa::Div(g, Isa::Add(Isa::Broadcast(1.0f), e));
  return Isa::Mul(silu, Isa::Add(u, Isa::Broadcast(swiglu.up_offset)));
}

}  // namespace cpumoe
