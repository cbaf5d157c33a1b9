#include "linear/packed_matrix.h"

#include <algorithm>
#include <cstddef>
#include <new>

#include "base/bits.h"
#include "base/check.h"

namespace cpumoe {
namespace {

// No model comes near this limit, and products of two sizes do not overflow 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 24;

const LinearConfig& Checked(const TileFormat& format, const LinearConfig& c) {
  Require(c.out_features > 0 && c.out_features <= kMaxSize, "out_features: expected 1 to ",
          kMaxSize, ", got ", c.out_features);
  Require(c.in_features > 0 && c.in_features <= kMaxSize, "in_features: expected 1 to ", kMaxSize,
          ", got ", c.in_features);
  format.RequireWholeBytes(c.in_features, "in_features");
  Require(c.nodes.size() <= kMaxMemoryNodes, "nodes: expected at most ", kMaxMemoryNodes, ", got ",
          c.nodes.size());
  return c;
}

}  // namespace

PackedMatrix::PackedMatrix(const TileFormat& format, const LinearConfig& config)
    : format_(&format),
      config_(Checked(format, config)),
      layout_(format.shape, config.out_features, config.in_features),
      shares_(layout_.tiles(), config.nodes),
      packed_(Allocate()),
      bias_(config.has_bias ? config.out_features : 0) {}

std::vector<AlignedBuffer> PackedMatrix::Allocate() const {
  std::vector<AlignedBuffer> packed;
  try {
    for (int n = 0; n < shares_.count(); ++n) {
      const int node = config_.nodes.empty() ? kAnyNode : config_.nodes[n].id;
      packed.emplace_back(static_cast<size_t>(shares_.tiles(n) * layout_.TileBytes()), node);
    }
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(Message("cannot allocate ", layout_.bytes() >> 20, " MiB for a matrix"));
  }
  return packed;
}

std::vector<MemoryShare> PackedMatrix::memory() const {
  std::vector<MemoryShare> memory;
  for (const AlignedBuffer& packed : packed_) memory.push_back(packed.share());
  return memory;
}

void PackedMatrix::Pack(const RawMatrix& source, const float* bias, ThreadPool& pool) {
  source.RequireShape(layout_.rows(), layout_.columns());
  format_->require_scales(source);
  Require((bias != nullptr) == config_.has_bias, source.name,
          config_.has_bias ? ": expected a bias, got none" : ": expected no bias, got one");
  std::vector<ScaleRange> ranges(pool.num_threads());
  // About half a huge page. If threads wrote neighbouring tiles for the first time, each of them
  // would clear the same page.
  constexpr auto kTaskBytes = static_cast<int64_t>(AlignedBuffer::kHugePage / 2);
  // Where memory does not come from the right node anyway, the thread that writes it decides.
  const bool bound = std::ranges::all_of(
      packed_, [](const AlignedBuffer& buffer) { return buffer.bound() || buffer.size() == 0; });
  const auto when_done = bound ? ThreadPool::WhenDone::kHelp : ThreadPool::WhenDone::kWait;
  ForTiles(kTaskBytes, pool, when_done, [&](int64_t tile, int thread) {
    ranges[thread].Merge(format_->pack(layout_, source, tile, Origin(tile)));
  });
  for (const ScaleRange& range : ranges) ranges[0].Merge(range);
  range_ = ranges[0];
  stored_ = format_->ScalesOf(source);
  if (bias != nullptr) std::copy_n(bias, bias_.size(), bias_.data());
}

void PackedMatrix::Unpack(const MutableRawMatrix& out, ThreadPool& pool) const {
  out.RequireShape(config_.out_features, config_.in_features);
  format_->require_holds_scales(out, 0, 0, stored_.grid);
  constexpr int64_t kTaskBytes = int64_t{64} << 10;
  ForTiles(kTaskBytes, pool, ThreadPool::WhenDone::kHelp, [&](int64_t tile, int /*thread*/) {
    format_->unpack(Tile(tile), tile, out.rows, 0, 0, out);
    format_->finish_unpacking();
  });
}

// Calls body(tile, thread) for every tile, in tasks of about `task_bytes`, on the tile's node
// first.
template <class Body>
void PackedMatrix::ForTiles(int64_t task_bytes, ThreadPool& pool, ThreadPool::WhenDone when_done,
                            Body&& body) const {
  const int64_t width = std::max<int64_t>(task_bytes / layout_.TileBytes(), 1);
  ForEachPiece(
      pool, shares_, width, 1,
      [&](int64_t, TileRange tiles, int thread) {
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) body(tile, thread);
      },
      when_done);
}

}  // namespace cpumoe
