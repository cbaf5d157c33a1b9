// The packed weights of all experts of a layer. Nothing here depends on an ISA, and only a
// TileFormat knows the weight format, so that one object file serves all variant libraries.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/memory_node.h"
#include "moe/config.h"
#include "moe/moe.h"
#include "packing/tile_format.h"
#include "packing/tile_shares.h"

namespace cpumoe {

enum class Projection { kGate, kUp, kDown };
inline constexpr int kProjections = 3;

class PackedExperts {
 public:
  // `format` outlives the object. Throws std::invalid_argument and OutOfMemory.
  PackedExperts(const TileFormat& format, const MoeConfig& config);

  const TileFormat& format() const { return *format_; }
  const MoeConfig& config() const { return config_; }
  // The bytes of one packed copy, its biases included.
  int64_t copy_bytes() const {
    return PackedBytes() + (biases_.empty() ? 0 : BiasSize() * int64_t{sizeof(float)});
  }
  // One byte per copy, which says whether the copy has been packed.
  const std::vector<uint8_t>& has_weights() const { return has_weights_; }
  bool HasWeights(int64_t expert) const {
    config_.RequireExperts(expert, 1);
    return has_weights_[config_.CopyOf(expert)] != 0;
  }

  // What calls read, by the number of the copy.
  const ScaleRange& scales(int64_t copy) const { return scales_[copy]; }
  // What the stored matrices had. The types of grids are not kOwn.
  const std::array<StoredScales, kProjections>& stored(int64_t copy) const { return stored_[copy]; }
  // What multiplies all weights of a matrix.
  float Factor(int64_t copy, Projection p) const {
    return format_->FactorOf(stored_[copy][static_cast<int>(p)]);
  }

  const TileLayout& layout(Projection p) const { return p == Projection::kDown ? down_ : gate_up_; }
  // How the tiles of a projection are divided among nodes.
  const TileShares& shares(Projection p) const {
    return p == Projection::kDown ? down_shares_ : gate_up_shares_;
  }
  TileView Tile(int64_t copy, Projection p, int64_t tile) const {
    return layout(p).Tile(Matrix(copy, p, shares(p).Of(tile)), tile);
  }
  // [rows of the projection], or null if experts have no biases.
  const float* Bias(int64_t copy, Projection p) const {
    if (biases_.empty()) return nullptr;
    return biases_.data() + copy * BiasSize() + static_cast<int64_t>(p) * config_.intermediate_size;
  }

  // Moe::memory, Moe::Pack and Moe::Evict.
  std::vector<MemoryShare> memory() const;
  void Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool);
  void Evict(int64_t expert);

 private:
  // The memory of a node.
  struct Share {
    int64_t copy_bytes;  // of the node's tiles of one copy
    // For each copy: tiles of gate, if there is one, and up in turn, then the tiles of down. Tiles
    // of gate and up are read together. If one matrix followed the other, both would lie at the
    // same offsets of their pages, which makes memory and caches a tenth slower.
    AlignedBuffer packed;
  };

  template <class Body>
  void ForEachTile(ThreadPool& pool, Body&& body) const;
  std::vector<Share> Allocate() const;
  void RequireFits(int64_t expert, const ExpertSource& source) const;

  bool gated() const { return config_.glu.gated; }
  // The first projection that experts have.
  int First() const { return gated() ? 0 : 1; }
  // How many matrices take turns before down: gate and up, or up alone.
  int64_t Shared() const { return gated() ? 2 : 1; }
  int64_t PackedBytes() const { return Shared() * gate_up_.bytes() + down_.bytes(); }
  int64_t BiasSize() const { return 2 * config_.intermediate_size + config_.hidden_size; }
  // The address that tile 0 of a matrix would have in the memory of a node.
  std::byte* Matrix(int64_t copy, Projection p, int node) const {
    const int64_t pairs = gate_up_shares_.tiles(node);
    const int64_t tiles = p == Projection::kGate ? 0
                          : p == Projection::kUp ? Shared() - 1
                                                 : Shared() * pairs;
    const Share& share = shares_[node];
    return layout(p).Origin(
        share.packed.data() + copy * share.copy_bytes + tiles * gate_up_.TileBytes(),
        shares(p).begin(node));
  }

  const TileFormat* format_;
  MoeConfig config_;
  TileLayout gate_up_;
  TileLayout down_;
  TileShares gate_up_shares_;
  TileShares down_shares_;
  std::vector<Share> shares_;
  std::vector<float> biases_;       // [copies][gate | up | down], empty without biases
  std::vector<ScaleRange> scales_;  // by copy, over its three matrices
  std::vector<std::array<StoredScales, kProjections>> stored_;  // by copy
  std::vector<uint8_t> has_weights_;
};

}  // namespace cpumoe
