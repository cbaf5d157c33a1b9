// Experts in symmetric INT4: sixteen integers by table, bf16 scales.
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
  // Code times scale has eleven significant bits: exact where multiplicands are fp32, and absent
  // where they are bf16 (the ISA then has no LoadFold for bf16 scales).
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

// Nothing but the codec is INT4's own.
template <class Isa>
class Int4Moe final : public MoeOperator<Int4Moe<Isa>, Isa> {
  using Base = MoeOperator<Int4Moe<Isa>, Isa>;

 public:
  explicit Int4Moe(const MoeConfig& config) : Base(config) {}
};

}  // namespace cpumoe
