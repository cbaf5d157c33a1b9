// MoeOperator: a layer's routed experts, for any weight format and ISA.
//
// The base class connects what formats share (packed weights, export, the forward pass) with what
// is compiled for the format: how tiles are packed (TileFormat), and the compute paths
// (ComputePath). A derived operator (mxfp4_moe-inl.h, ...) only names its codec. The codec names
// the weight format and turns a packed group into multiplicands:
//
//   template <class Isa> struct MyCodec { using Format = ...; Decode, GroupScales, FoldScales,
//                                            DecodeFolded };
//   template <class Isa> struct OperatorTraits<MyMoe<Isa>> { using Codec = MyCodec<Isa>; };
//   template <class Isa> class MyMoe final : public MoeOperator<MyMoe<Isa>, Isa> { ... };
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "kernels/isa.h"
#include "moe/forward_pass.h"
#include "moe/moe.h"
#include "moe/packed_experts.h"
#include "moe/unpack_expert.h"
#include "packing/tile_format-inl.h"
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

  explicit MoeOperator(const MoeConfig& config) : weights_(kTileFormat<Isa, Format>, config) {}

  const MoeConfig& config() const final { return weights_.config(); }
  int64_t copy_bytes() const final { return weights_.copy_bytes(); }
  std::vector<MemoryShare> memory() const final { return weights_.memory(); }
  bool HasWeights(int64_t expert) const final { return weights_.HasWeights(expert); }
  std::array<StoredScales, kProjections> Scales(int64_t expert) const final {
    RequireWeights(expert);
    return weights_.stored(config().CopyOf(expert));
  }

  void Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool) final {
    weights_.Pack(expert, source, pool);
  }
  void Evict(int64_t expert) final { weights_.Evict(expert); }
  int64_t UnpackTasks(std::span<const ExpertDestination> out) const final {
    return ExpertUnpacker(weights_, out).tasks();
  }
  void Unpack(int64_t expert, std::span<const ExpertDestination> out, int64_t begin, int64_t end,
              ThreadPool& pool) const final {
    const ExpertUnpacker unpacker(weights_, out);
    RequireWeights(expert);
    unpacker.Run(expert, begin, end, pool);
  }
  void Forward(const ForwardArgs& args, ThreadPool& pool, Workspace& workspace) const final {
    ForwardExperts<Isa>(weights_, ComputePathOf<Isa, Codec>(config().precision, args), args, pool,
                        workspace);
  }

 private:
  void RequireWeights(int64_t expert) const {
    Require(HasWeights(expert), "expert ", expert, " has no weights to export; pack it first");
  }

  PackedExperts weights_;
};

}  // namespace cpumoe
