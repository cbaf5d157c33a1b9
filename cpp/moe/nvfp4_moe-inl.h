// Experts in NVFP4: a table gives the sixteen E2M1 values, and a code times a scale has six
// significant bits, which are exact in every multiplicand. The pass applies a matrix's factor.
#pragma once

#include "formats/nvfp4.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

template <class Isa>
struct Nvfp4Codec {
  using Format = Nvfp4;
  typename Isa::Table16 e2m1 = Isa::MakeTable(Nvfp4::kCodeValues);

  template <int kPair>
  typename Isa::Pair Decode(const typename Isa::Codes& codes) const {
    return Isa::template Lookup<kPair>(e2m1, codes);
  }
  static typename Isa::Vec GroupScales(const UE5M3* scales) { return Isa::LoadScales(scales); }
  static auto FoldScales(const UE5M3* scales) { return Isa::LoadFold(scales); }
  template <int kPair>
  typename Isa::Pair DecodeFolded(const typename Isa::Codes& codes, const auto& fold) const {
    return Isa::Multiply(Decode<kPair>(codes), fold);
  }
};

template <class Isa>
class Nvfp4Moe;

template <class Isa>
struct OperatorTraits<Nvfp4Moe<Isa>> {
  using Codec = Nvfp4Codec<Isa>;
};

template <class Isa>
class Nvfp4Moe final : public MoeOperator<Nvfp4Moe<Isa>, Isa> {
 public:
  using MoeOperator<Nvfp4Moe<Isa>, Isa>::MoeOperator;
};

}  // namespace cpumoe
