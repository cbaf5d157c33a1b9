// Experts in bf16: a packed vector is already a pair of bf16 weights per row.
#pragma once

#include "formats/bf16.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

template <class Isa>
struct Bf16WeightsCodec {
  using Format = Bf16Weights;

  template <int kPair>
  static typename Isa::Pair Decode(const typename Isa::Codes& codes) {
    static_assert(kPair == 0);
    return Isa::FromBf16(codes);
  }
};

template <class Isa>
class Bf16WeightsMoe;

template <class Isa>
struct OperatorTraits<Bf16WeightsMoe<Isa>> {
  using Codec = Bf16WeightsCodec<Isa>;
};

template <class Isa>
class Bf16WeightsMoe final : public MoeOperator<Bf16WeightsMoe<Isa>, Isa> {
 public:
  using MoeOperator<Bf16WeightsMoe<Isa>, Isa>::MoeOperator;
};

}  // namespace cpumoe
