// One packed matrix with its bias. Nothing here depends on an ISA, and only a TileFormat knows the
// weight format (moe/packed_experts.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/memory_node.h"
#include "linear/linear.h"
#include "packing/tile_format.h"
#include "packing/tile_shares.h"
#include "threading/thread_pool.h"

namespace cpumoe {

class PackedMatrix {
 public:
  // `format` outlives the object. Throws std::invalid_argument and OutOfMemory.
  PackedMatrix(const TileFormat& format, const LinearConfig& config);

  const LinearConfig& config() const { return config_; }
  const TileLayout& layout() const { return layout_; }
  int64_t bytes() const { return layout_.bytes() + std::ssize(bias_) * int64_t{sizeof(float)}; }
  // How the tiles are divided among nodes.
  const TileShares& shares() const { return shares_; }
  TileView Tile(int64_t tile) const { return layout_.Tile(Origin(tile), tile); }
  // Linear::memory.
  std::vector<MemoryShare> memory() const;
  const ScaleRange& scale_range() const { return range_; }
  const StoredScales& stored() const { return stored_; }
  // What multiplies all weights.
  float factor() const { return format_->FactorOf(stored_); }
  // [out_features], or null if there is none.
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

  // Linear::Pack and Linear::Unpack.
  void Pack(const RawMatrix& source, const float* bias, ThreadPool& pool);
  void Unpack(const MutableRawMatrix& out, ThreadPool& pool) const;

 private:
  template <class Body>
  void ForTiles(int64_t task_bytes, ThreadPool& pool, ThreadPool::WhenDone when_done,
                Body&& body) const;
  std::vector<AlignedBuffer> Allocate() const;
  // The address that tile 0 would have in the memory of the node that has `tile`.
  std::byte* Origin(int64_t tile) const {
    const int node = shares_.Of(tile);
    return layout_.Origin(packed_[node].data(), shares_.begin(node));
  }

  const TileFormat* format_;
  LinearConfig config_;
  TileLayout layout_;
  TileShares shares_;
  std::vector<AlignedBuffer> packed_;  // by node
  std::vector<float> bias_;            // empty without a bias
  ScaleRange range_;
  StoredScales stored_;
};

}  // namespace cpumoe
