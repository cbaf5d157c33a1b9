// Experts in MXFP4: a table gives the sixteen E2M1 values, and E8M0 scales fold into the exponent.
#pragma once

#include "formats/mxfp4.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

template <class Isa>
struct Mxfp4Codec {
  using Format = Mxfp4;
  typename Isa::Table16 e2m1 = Isa::MakeTable(Mxfp4::kCodeValues);
  typename Isa::Table16 foldable =
      Isa::MakeTable(TimesFoldUnit(Mxfp4::kCodeValues, Isa::kFoldUnit));

  template <int kPair>
  typename Isa::Pair Decode(const typename Isa::Codes& codes) const {
    return Isa::template Lookup<kPair>(e2m1, codes);
  }
  static typename Isa::Vec GroupScales(const E8M0* scales) { return Isa::LoadScales(scales); }
  // Scales are powers of two, which are exact in every multiplicand type.
  static typename Isa::Fold FoldScales(const E8M0* scales) { return Isa::LoadFold(scales); }
  template <int kPair>
  typename Isa::Pair DecodeFolded(const typename Isa::Codes& codes, typename Isa::Fold fold) const {
    return Isa::Multiply(Isa::template Lookup<kPair>(foldable, codes), fold);
  }
};

template <class Isa>
class Mxfp4Moe;

template <class Isa>
struct OperatorTraits<Mxfp4Moe<Isa>> {
  using Codec = Mxfp4Codec<Isa>;
};

template <class Isa>
class Mxfp4Moe final : public MoeOperator<Mxfp4Moe<Isa>, Isa> {
 public:
  using MoeOperator<Mxfp4Moe<Isa>, Isa>::MoeOperator;
};

}  // namespace cpumoe
