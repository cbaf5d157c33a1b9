// A format's codec for the byte paths (digits, int8).
#pragma once

#include "formats/integer_codes.h"
#include "staging/staging.h"

namespace cpumoe {

// Decodes a format's codes to bytes. Group scales come from the format's own codec.
template <class Isa, class FloatCodec>
struct ByteCodec {
  using Format = typename FloatCodec::Format;
  using Integers = IntegerCodes<Format>;
  static constexpr int kGreatest = Integers::kGreatest;
  static constexpr int kOffset = Integers::kOffset;
  static constexpr float kUnit = Format::kUnit;
  typename Isa::ByteTable table = Isa::MakeByteTable(Integers::kBytes);

  template <int kQuad>
  typename Isa::Quad DecodeQuad(const typename Isa::Codes& codes) const {
    return Isa::template LookupQuad<kQuad>(table, codes);
  }
  static typename Isa::Vec GroupScales(const typename Format::Scale* scales) {
    return FloatCodec::GroupScales(scales);
  }
};

// `Codec` is a ByteCodec.
template <class Codec>
inline constexpr ByteWeights kByteWeights = {.offset = Codec::kOffset, .unit = Codec::kUnit};

}  // namespace cpumoe
