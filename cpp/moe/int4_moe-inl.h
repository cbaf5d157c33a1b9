// Experts in symmetric INT4: a table gives the sixteen integers, and scales are bf16.
#pragma once

#include "formats/int4.h"
#include "moe/moe_operator-inl.h"

namespace cpumoe {

template <class Isa>
struct Int4Codec {
  using Format = Int4;
  typename Isa::Table16 integers = Isa::MakeTable(Int4::kCodeValues);

  template <int kPair>
  auto Decode(const typename Isa::Codes& packed) const -> typename Isa::Pair {
    return Isa::template Lookup<kPair>(integers, packed);
  }
  static auto GroupScales(const Bf16* group) -> typename Isa::Vec { return Isa::LoadScales(group); }
  // A code times a scale has eleven significant bits, which are exact in fp32 multiplicands. With
  // bf16 multiplicands they are not, so such an ISA has no LoadFold for bf16 scales, and this
  // function does not exist there.
  template <class Scale>
  static auto FoldScales(const Scale* group) -> decltype(Isa::LoadFold(group)) {
    return Isa::LoadFold(group);
  }
  template <int kPair>
  auto DecodeFolded(const typename Isa::Codes& packed, typename Isa::Fold fold) const ->
      typename Isa::Pair {
    static_assert(Isa::kFoldUnit == 1.0f);
    return Isa::Multiply(Decode<kPair>(packed), fold);
  }
};

template <class Isa>
class Int4Moe;

template <class Isa>
struct OperatorTraits<Int4Moe<Isa>> {
  using Codec = Int4Codec<Isa>;
};

// Only the codec is specific to INT4.
template <class Isa>
class Int4Moe final : public MoeOperator<Int4Moe<Isa>, Isa> {
  using Base = MoeOperator<Int4Moe<Isa>, Isa>;

 public:
  explicit Int4Moe(const MoeConfig& config) : Base(config) {}
};

}  // namespace cpumoe
