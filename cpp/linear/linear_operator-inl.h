// LinearOperator: one packed matrix, for any weight format and ISA. A codec is that of the format's
// experts (moe/moe_operator-inl.h), and so are tiles, paths and kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "linear/linear.h"
#include "linear/linear_pass.h"
#include "linear/packed_matrix.h"
#include "packing/tile_format-inl.h"
#include "paths/compute_paths-inl.h"

namespace cpumoe {

template <class Isa, class Codec>
class LinearOperator final : public Linear {
 public:
  explicit LinearOperator(const LinearConfig& config)
      : matrix_(kTileFormat<Isa, typename Codec::Format>, config) {}

  const LinearConfig& config() const final { return matrix_.config(); }
  int64_t bytes() const final { return matrix_.bytes(); }
  const StoredScales& scales() const final { return matrix_.stored(); }
  std::vector<MemoryShare> memory() const final { return matrix_.memory(); }

  void Pack(const RawMatrix& source, const float* bias, ThreadPool& pool) final {
    matrix_.Pack(source, bias, pool);
  }
  void Unpack(const MutableRawMatrix& out, ThreadPool& pool) const final {
    matrix_.Unpack(out, pool);
  }
  void Forward(const LinearArgs& args, ThreadPool& pool, ScratchMemory& scratch) const final {
    ForwardLinear<Isa>(matrix_, ComputePathOf<Isa, Codec>(config().kernels.precision, args), args,
                       pool, scratch);
  }

 private:
  PackedMatrix matrix_;
};

}  // namespace cpumoe
