// Experts in bf16: a packed vector is already a pair of bf16 weights per row.
#pragma once

#include <concepts>
#include <cstddef>

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
  // Where pairs are bf16, packed vectors are pairs.
  static const typename Isa::Pair* Pairs(const std::byte* packed)
    requires std::same_as<typename Isa::Activation, Bf16>
  {
    static_assert(sizeof(typename Isa::Pair) == kVectorBytes);
    return reinterpret_cast<const typename Isa::Pair*>(packed);
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
