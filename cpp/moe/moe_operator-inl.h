// MoeOperator: a layer's routed experts, for any weight format and ISA.
//
// The base class owns everything that formats share: checks, packing, export, routing, and the
// compute paths. A derived operator (mxfp4_moe-inl.h, ...) only names its codec. The codec names
// the weight format and turns a packed group into multiplicands:
//
//   template <class Isa> struct MyCodec { using Format = ...; Decode, GroupScales, FoldScales,
//                                            DecodeFolded };
//   template <class Isa> struct OperatorTraits<MyMoe<Isa>> { using Codec = MyCodec<Isa>; };
//   template <class Isa> class MyMoe final : public MoeOperator<MyMoe<Isa>, Isa> { ... };
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "base/check.h"
#include "kernels/isa.h"
#include "moe/forward_pass-inl.h"
#include "moe/moe.h"
#include "moe/packed_weights.h"
#include "moe/unpack_expert-inl.h"
#include "paths/compute_paths-inl.h"

namespace cpumoe {

// Names the codec of a derived operator. MoeOperator needs it while the derived class is still
// incomplete.
template <class Derived>
struct OperatorTraits;

template <class Derived, class Isa>
class MoeOperator : public Moe {
 public:
  using Codec = typename OperatorTraits<Derived>::Codec;
  using Format = typename Codec::Format;
  static_assert(WeightFormat<Format>, "a codec's Format must say how a checkpoint stores weights");
  // The paths of each precision. Formats without integer codes have no int8 path.
  using DefaultPath = DefaultPathOf<Isa, Codec>;
  using Int8Path = Int8PathOf<Isa, Codec>;
  static_assert(StreamIsa<Isa>, "an ISA must say how it writes past the caches");
  static_assert(
      TileCodec<FloatCodecOf<Isa, Codec>, FloatIsaOf<Isa, Codec>>,
      "a codec must decode packed vectors and load group scales, on the ISA or Isa::Wide");

  explicit MoeOperator(const MoeConfig& config) : weights_(config) {}

  const MoeConfig& config() const final { return weights_.config(); }
  int64_t copy_bytes() const final { return weights_.copy_bytes(); }
  bool HasWeights(int64_t expert) const final { return weights_.HasWeights(expert); }
  std::array<StoredScales, kProjections> Scales(int64_t expert) const final {
    RequireWeights(expert);
    return weights_.stored(config().CopyOf(expert));
  }
  const PackedWeights<Format>& weights() const { return weights_; }
  const Codec& codec() const { return codec_; }

  // Whether every product of a code and a scale of the copy is exact in the ISA's multiplicand
  // type.
  bool FoldsExactly(int64_t copy) const {
    return cpumoe::FoldsExactly<Isa, Codec>(weights_.scales(copy));
  }

  void Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool) final {
    weights_.Pack(expert, source, pool);
  }
  void Evict(int64_t expert) final { weights_.Evict(expert); }
  int64_t UnpackTasks(std::span<const ExpertDestination> out) const final {
    return ExpertUnpacker<Isa, Format>(weights_, out).tasks();
  }
  void Unpack(int64_t expert, std::span<const ExpertDestination> out, int64_t begin, int64_t end,
              ThreadPool& pool) const final {
    const ExpertUnpacker<Isa, Format> unpacker(weights_, out);
    RequireWeights(expert);
    unpacker.Run(expert, begin, end, pool);
  }
  void Forward(const ForwardArgs& args, ThreadPool& pool, Workspace& workspace) const final {
    WithPath<Isa, Codec>(config().precision, args, [&]<class Path>(std::type_identity<Path>) {
      Forward<Path>(args, pool, workspace);
    });
  }

 private:
  void RequireWeights(int64_t expert) const {
    Require(HasWeights(expert), "expert ", expert, " has no weights to export; pack it first");
  }

  static constexpr int64_t kMaxRoundPairs = 16384;

  template <class Path>
  void Forward(const ForwardArgs& args, ThreadPool& pool, Workspace& workspace) const {
    // Rounds bound the memory for staged activations, however long the prompt is.
    const int64_t round =
        kMaxRoundPairs / std::clamp<int64_t>(args.routing.top_k, 1, kMaxRoundPairs);
    ForwardPass<Isa, MoeOperator, Path> pass(*this, args, pool, workspace);
    for (int64_t begin = 0; begin < args.tokens; begin += round) {
      pass.Run(begin, std::min(begin + round, args.tokens));
    }
  }

  PackedWeights<Format> weights_;
  Codec codec_;
};

}  // namespace cpumoe
