// The packed weights of all experts of a layer, in one format.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/check.h"
#include "moe/config.h"
#include "moe/moe.h"
#include "packing/pack.h"

namespace cpumoe {

enum class Projection { kGate, kUp, kDown };
inline constexpr int kProjections = 3;

template <WeightFormat F>
class PackedWeights {
 public:
  explicit PackedWeights(const MoeConfig& config)
      : config_(Checked(config)),
        gate_up_(config.intermediate_size, config.hidden_size, config.glu.gated ? 2 : 1),
        down_(config.hidden_size, config.intermediate_size),
        packed_(Allocate(config.copies(), PackedBytes())),
        biases_(config.has_bias ? config.copies() * BiasSize() : 0),
        scales_(config.copies()),
        stored_(config.copies()),
        has_weights_(config.copies(), 0) {}

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
    return kHasFactorOf<F> ? stored_[copy][static_cast<int>(p)].factor : 1.0f;
  }

  const PackedLayout<F>& layout(Projection p) const {
    return p == Projection::kDown ? down_ : gate_up_;
  }
  TileView Tile(int64_t copy, Projection p, int64_t tile) const {
    return layout(p).Tile(Matrix(copy, p), tile);
  }
  // [rows of the projection], or null if experts have no biases.
  const float* Bias(int64_t copy, Projection p) const {
    if (biases_.empty()) return nullptr;
    return biases_.data() + copy * BiasSize() + static_cast<int64_t>(p) * config_.intermediate_size;
  }

  void Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool) {
    config_.RequireExperts(expert, 1);
    if (gated()) {
      source.gate.RequireShape(gate_up_.rows(), gate_up_.columns());
    } else {
      Require(source.gate.codes == nullptr, source.gate.name,
              ": expected none, because the layer's experts have no gate projection");
    }
    source.up.RequireShape(gate_up_.rows(), gate_up_.columns());
    source.down.RequireShape(down_.rows(), down_.columns());
    const RawMatrix* const matrices[] = {&source.gate, &source.up, &source.down};
    for (int p = First(); p < kProjections; ++p) matrices[p]->RequireScales<F>();
    const bool biased = source.up_bias != nullptr;
    Require(biased == config_.has_bias && (biased && gated()) == (source.gate_bias != nullptr) &&
                biased == (source.down_bias != nullptr),
            "expert ", expert, ": ",
            !config_.has_bias ? "no biases"
            : gated()         ? "three biases"
                              : "biases of up and down",
            " expected, as the layer's has_bias says");
    const int64_t copy = config_.CopyOf(expert);
    has_weights_[copy] = 0;
    std::vector<ScaleRange> ranges(pool.num_threads());
    ForEachTile(pool, [&](Projection p, int64_t tile, int thread) {
      const RawMatrix& matrix = *matrices[static_cast<int>(p)];
      ranges[thread].Merge(layout(p).PackTile(matrix, tile, Matrix(copy, p)));
    });
    for (const ScaleRange& range : ranges) ranges[0].Merge(range);
    scales_[copy] = ranges[0];
    for (int p = First(); p < kProjections; ++p) {
      StoredScales& stored = stored_[copy][p] = {matrices[p]->grid, matrices[p]->factor};
      if (stored.grid.type == ScaleType::kOwn) {
        stored.grid.type = TypeOfScale<typename F::Scale>();
      }
    }
    if (biased) {
      float* bias = biases_.data() + copy * BiasSize();
      if (gated()) std::copy_n(source.gate_bias, config_.intermediate_size, bias);
      bias += config_.intermediate_size;
      bias = std::copy_n(source.up_bias, config_.intermediate_size, bias);
      std::copy_n(source.down_bias, config_.hidden_size, bias);
    }
    has_weights_[copy] = 1;
  }

  void Evict(int64_t expert) {
    config_.RequireExperts(expert, 1);
    const int64_t copy = config_.CopyOf(expert);
    has_weights_[copy] = 0;
    packed_.GiveBack(copy * PackedBytes(), PackedBytes());
  }

 private:
  // No model comes near these limits, and products of them do not overflow 64 bits.
  static constexpr int64_t kMaxExperts = int64_t{1} << 16;
  static constexpr int64_t kMaxSize = int64_t{1} << 21;

  static const MoeConfig& Checked(const MoeConfig& c) {
    Require(c.num_experts > 0, "num_experts must be positive, got ", c.num_experts);
    CheckSize(c.hidden_size, "hidden_size");
    CheckSize(c.intermediate_size, "intermediate_size");
    Require(c.num_experts <= kMaxExperts, "num_experts must be at most ", kMaxExperts, ", got ",
            c.num_experts);
    Require(c.copy_of.empty() || std::ssize(c.copy_of) == c.num_experts, "copy_of must have no or ",
            c.num_experts, " elements, got ", c.copy_of.size());
    for (const int32_t copy : c.copy_of) {
      Require(copy >= 0 && copy < c.num_experts, "copy_of must have elements in [0, ",
              c.num_experts, "), got ", copy);
    }
    return c;
  }
  static void CheckSize(int64_t size, const char* name) {
    Require(size > 0, name, " must be positive, got ", size);
    RequireWholeBytes<F>(size, name);
    Require(size <= kMaxSize, name, " must be at most ", kMaxSize, ", got ", size);
  }

  // Calls body(projection, tile, thread) for every tile. A task is a run of tiles, about half a
  // huge page of them. If threads wrote neighbouring tiles for the first time, each of them would
  // clear the same page.
  template <class Body>
  void ForEachTile(ThreadPool& pool, Body&& body) const {
    constexpr auto kRunBytes = static_cast<int64_t>(AlignedBuffer::kHugePage / 2);
    const int64_t pairs = std::max<int64_t>(kRunBytes / (Shared() * gate_up_.TileBytes()), 1);
    const int64_t downs = std::max<int64_t>(kRunBytes / down_.TileBytes(), 1);
    const int64_t gate_up_tasks = CeilDiv(gate_up_.tiles(), pairs);
    pool.For(gate_up_tasks + CeilDiv(down_.tiles(), downs), [&](int64_t task, int thread) {
      if (task < gate_up_tasks) {
        const int64_t end = std::min((task + 1) * pairs, gate_up_.tiles());
        for (int64_t t = task * pairs; t < end; ++t) {
          if (gated()) body(Projection::kGate, t, thread);
          body(Projection::kUp, t, thread);
        }
      } else {
        const int64_t first = (task - gate_up_tasks) * downs;
        const int64_t end = std::min(first + downs, down_.tiles());
        for (int64_t t = first; t < end; ++t) body(Projection::kDown, t, thread);
      }
    });
  }

  static AlignedBuffer Allocate(int64_t copies, int64_t bytes) {
    try {
      return AlignedBuffer(static_cast<size_t>(copies * bytes));
    } catch (const std::bad_alloc&) {
      throw OutOfMemory(Message("cannot allocate ", (copies * bytes) >> 20, " MiB for ", copies,
                                " experts of ", bytes >> 20, " MiB each"));
    }
  }

  bool gated() const { return config_.glu.gated; }
  // The first projection that experts have.
  int First() const { return gated() ? 0 : 1; }
  // How many matrices take turns before down: gate and up, or up alone.
  int64_t Shared() const { return gated() ? 2 : 1; }
  int64_t PackedBytes() const { return Shared() * gate_up_.bytes() + down_.bytes(); }
  int64_t BiasSize() const { return 2 * config_.intermediate_size + config_.hidden_size; }
  std::byte* Matrix(int64_t copy, Projection p) const {
    const int64_t offset = p == Projection::kGate ? 0
                           : p == Projection::kUp ? (Shared() - 1) * gate_up_.TileBytes()
                                                  : Shared() * gate_up_.bytes();
    return packed_.data() + copy * PackedBytes() + offset;
  }

  MoeConfig config_;
  PackedLayout<F> gate_up_;
  PackedLayout<F> down_;
  // For each copy: tiles of gate, if there is one, and up in turn, then the tiles of down. Tiles of
  // gate and up are read together. If one matrix followed the other, both would lie at the same
  // offsets of their pages, which makes memory and caches a tenth slower.
  AlignedBuffer packed_;
  std::vector<float> biases_;       // [copies][gate | up | down], empty without biases
  std::vector<ScaleRange> scales_;  // by copy, over its three matrices
  std::vector<std::array<StoredScales, kProjections>> stored_;  // by copy
  std::vector<uint8_t> has_weights_;
};

}  // namespace cpumoe
