// One packed matrix with its bias, in one format.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/bits.h"
#include "base/check.h"
#include "formats/scale_grid.h"
#include "formats/weight_format.h"
#include "kernels/tile.h"
#include "linear/linear.h"
#include "packing/pack.h"
#include "threading/thread_pool.h"

namespace cpumoe {

template <WeightFormat F>
class PackedMatrix {
 public:
  explicit PackedMatrix(const LinearConfig& config)
      : config_(Checked(config)),
        layout_(config.out_features, config.in_features),
        packed_(Allocate(layout_.bytes())),
        bias_(config.has_bias ? config.out_features : 0) {}

  const LinearConfig& config() const { return config_; }
  const PackedLayout<F>& layout() const { return layout_; }
  int64_t bytes() const { return layout_.bytes() + std::ssize(bias_) * int64_t{sizeof(float)}; }
  TileView Tile(int64_t tile) const { return layout_.Tile(packed_.data(), tile); }
  const ScaleRange& scale_range() const { return range_; }
  const StoredScales& stored() const { return stored_; }
  // What multiplies all weights.
  float factor() const { return kHasFactorOf<F> ? stored_.factor : 1.0f; }
  // [out_features], or null if there is none.
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

  void Pack(const RawMatrix& source, const float* bias, ThreadPool& pool) {
    source.RequireShape(layout_.rows(), layout_.columns());
    source.template RequireScales<F>();
    Require((bias != nullptr) == config_.has_bias, source.name,
            config_.has_bias ? ": expected a bias, got none" : ": expected no bias, got one");
    std::vector<ScaleRange> ranges(pool.num_threads());
    // About half a huge page. If threads wrote neighbouring tiles for the first time, each of them
    // would clear the same page.
    constexpr auto kTaskBytes = static_cast<int64_t>(AlignedBuffer::kHugePage / 2);
    ForTiles(kTaskBytes, pool, [&](int64_t tile, int thread) {
      ranges[thread].Merge(layout_.PackTile(source, tile, packed_.data()));
    });
    for (const ScaleRange& range : ranges) ranges[0].Merge(range);
    range_ = ranges[0];
    stored_ = {source.grid, source.factor};
    if (stored_.grid.type == ScaleType::kOwn) stored_.grid.type = TypeOfScale<typename F::Scale>();
    if (bias != nullptr) std::copy_n(bias, bias_.size(), bias_.data());
  }

  // Calls body(tile, thread) for every tile, in tasks of about `task_bytes`.
  template <class Body>
  void ForTiles(int64_t task_bytes, ThreadPool& pool, Body&& body) const {
    const int64_t tiles = std::max<int64_t>(task_bytes / layout_.TileBytes(), 1);
    pool.For(CeilDiv(layout_.tiles(), tiles), [&](int64_t task, int thread) {
      const int64_t end = std::min((task + 1) * tiles, layout_.tiles());
      for (int64_t tile = task * tiles; tile < end; ++tile) body(tile, thread);
    });
  }

 private:
  // No model comes near this limit, and products of two sizes do not overflow 64 bits.
  static constexpr int64_t kMaxSize = int64_t{1} << 24;

  static const LinearConfig& Checked(const LinearConfig& c) {
    Require(c.out_features > 0 && c.out_features <= kMaxSize, "out_features: expected 1 to ",
            kMaxSize, ", got ", c.out_features);
    Require(c.in_features > 0 && c.in_features <= kMaxSize, "in_features: expected 1 to ", kMaxSize,
            ", got ", c.in_features);
    RequireWholeBytes<F>(c.in_features, "in_features");
    return c;
  }

  static AlignedBuffer Allocate(int64_t bytes) {
    try {
      return AlignedBuffer(static_cast<size_t>(bytes));
    } catch (const std::bad_alloc&) {
      throw OutOfMemory(Message("cannot allocate ", bytes >> 20, " MiB for a matrix"));
    }
  }

  LinearConfig config_;
  PackedLayout<F> layout_;
  AlignedBuffer packed_;
  std::vector<float> bias_;  // empty without a bias
  ScaleRange range_;
  StoredScales stored_;
};

}  // namespace cpumoe
