// Experts in symmetric INT4 with fp16 or fp32 scales.
#pragma once

#include "formats/int4_wide_scales.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

// Scales apply to sums. A code times an fp32 scale has more bits than any multiplicand.
template <class Isa>
struct Int4WideScalesCodec {
  using Format = Int4WideScales;
  typename Isa::Table16 integers = Isa::MakeTable(Int4WideScales::kCodeValues);

  template <int kPair>
  typename Isa::Pair Decode(const typename Isa::Codes& codes) const {
    return Isa::template Lookup<kPair>(integers, codes);
  }
  static typename Isa::Vec GroupScales(const Fp32* scales) { return Isa::Load(&scales->value); }
};

template <class Isa>
class Int4WideScalesMoe;

template <class Isa>
struct OperatorTraits<Int4WideScalesMoe<Isa>> {
  using Codec = Int4WideScalesCodec<Isa>;
};

template <class Isa>
class Int4WideScalesMoe final : public MoeOperator<Int4WideScalesMoe<Isa>, Isa> {
 public:
  using MoeOperator<Int4WideScalesMoe<Isa>, Isa>::MoeOperator;
};

}  // namespace cpumoe
