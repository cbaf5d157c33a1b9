// Experts in fp16: a packed vector is a pair of fp16 weights per row, which become fp32.
#pragma once

#include "formats/fp16.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

// bf16 does not hold fp16 weights. ISAs that multiply bf16 therefore compute in Isa::Wide.
template <class Isa>
struct Fp16WeightsCodec {
  using Format = Fp16Weights;

  template <int kPair>
    requires HoldsFp16<Isa>
  static typename Isa::Pair Decode(const typename Isa::Codes& codes) {
    static_assert(kPair == 0);
    return Isa::FromFp16(codes);
  }
};

template <class Isa>
class Fp16WeightsMoe;

template <class Isa>
struct OperatorTraits<Fp16WeightsMoe<Isa>> {
  using Codec = Fp16WeightsCodec<Isa>;
};

template <class Isa>
class Fp16WeightsMoe final : public MoeOperator<Fp16WeightsMoe<Isa>, Isa> {
 public:
  using MoeOperator<Fp16WeightsMoe<Isa>, Isa>::MoeOperator;
};

}  // namespace cpumoe
