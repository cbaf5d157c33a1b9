// The floating point path of Isa::Wide, which has fp32 activations, on an ISA whose own floating
// point kernels would round activations to bf16.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/product.h"
#include "kernels/tile.h"
#include "kernels/token_blocks.h"
#include "paths/float_path-inl.h"

namespace cpumoe {

// Names the codec of a codec's format on another ISA.
template <class Codec, class Isa>
struct CodecOn;
template <template <class> class CodecOf, class Isa, class Other>
struct CodecOn<CodecOf<Isa>, Other> {
  using Type = CodecOf<Other>;
};

template <class Isa, class Codec>
class WidePath
    : public FloatPath<typename Isa::Wide, typename CodecOn<Codec, typename Isa::Wide>::Type> {
  using WideCodec = typename CodecOn<Codec, typename Isa::Wide>::Type;
  using Base = FloatPath<typename Isa::Wide, WideCodec>;

 public:
  // Where scales fold in panels and not in the fused kernel, panels serve any number of tokens, so
  // that an fp32 token's result does not depend on the other tokens of its batch.
  static constexpr int kFewTokenLimit =
      kAlwaysFolds<WideCodec, typename Isa::Wide> ? 0 : Base::kFewTokenLimit;

  static void Multiply(const Codec&, std::span<const TilePair> w, StagedForm form,
                       const std::byte* staged, std::byte* panel, const Product& c) {
    Base::Multiply(WideCodec{}, w, form, staged, panel, c);
  }
};

}  // namespace cpumoe
