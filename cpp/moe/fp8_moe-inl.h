// Experts in FP8: E4M3 codes become multiplicands by shifts and additions.
#pragma once

#include "formats/fp8.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

// Scales apply to sums. A code times an fp32 scale has more bits than any multiplicand.
template <class Isa>
struct Fp8Codec {
  using Format = Fp8;

  template <int kPair>
  static typename Isa::Pair Decode(const typename Isa::Codes& codes) {
    return Isa::template FromE4M3<kPair>(codes);
  }
  static typename Isa::Vec GroupScales(const Fp32* scales) { return Isa::Load(&scales->value); }
};

template <class Isa>
class Fp8Moe;

template <class Isa>
struct OperatorTraits<Fp8Moe<Isa>> {
  using Codec = Fp8Codec<Isa>;
};

template <class Isa>
class Fp8Moe final : public MoeOperator<Fp8Moe<Isa>, Isa> {
 public:
  using MoeOperator<Fp8Moe<Isa>, Isa>::MoeOperator;
};

}  // namespace cpumoe
