// Which tiles of a matrix lie in the memory of which node.
//
// A node holds a range of output rows, and its threads multiply these rows. Each output is thus
// summed whole, by one task, in one order. Results have the same bits for any number of nodes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/bits.h"
#include "base/memory_node.h"
#include "kernels/tile.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// Tiles [begin, end) of a matrix.
struct TileRange {
  int64_t begin, end;
};

// Divides tiles among nodes in proportion to their threads. Nodes get whole pairs of tiles, which
// are what kernels multiply together, and a group of intermediate features. Without nodes there is
// one share. A node may get no tiles.
class TileShares {
 public:
  TileShares(int64_t tiles, std::span<const MemoryNode> nodes)
      : count_(std::max<int>(static_cast<int>(nodes.size()), 1)) {
    int64_t threads = 0, before = 0;
    for (const MemoryNode& node : nodes) threads += node.threads;
    const int64_t pairs = CeilDiv(tiles, kPair);
    for (size_t n = 0; n < nodes.size(); ++n) {
      before += nodes[n].threads;
      ends_[n] = std::min((pairs * before + threads / 2) / threads * kPair, tiles);
    }
    ends_[count_ - 1] = tiles;
  }

  int count() const { return count_; }
  int64_t begin(int share) const { return share == 0 ? 0 : ends_[share - 1]; }
  int64_t end(int share) const { return ends_[share]; }
  int64_t tiles(int share) const { return end(share) - begin(share); }
  // The share that has a tile.
  int Of(int64_t tile) const {
    int share = 0;
    while (tile >= ends_[share]) ++share;
    return share;
  }

 private:
  static constexpr int64_t kPair = TilePair::kCount;
  static_assert(kGroupSize == kPair * kTileRows);

  int count_;
  std::array<int64_t, kMaxMemoryNodes> ends_{};
};

// Calls body(round, tiles, thread) for each round in [0, rounds) and each piece of `width` tiles
// that lie in the memory of one node, on the node's threads first. The last piece of a node may
// have fewer tiles.
template <class Body>
void ForEachPiece(ThreadPool& pool, const TileShares& shares, int64_t width, int64_t rounds,
                  Body&& body, ThreadPool::WhenDone when_done = ThreadPool::WhenDone::kHelp) {
  std::array<int64_t, kMaxMemoryNodes> pieces, tasks;
  for (int n = 0; n < shares.count(); ++n) {
    pieces[n] = CeilDiv(shares.tiles(n), width);
    tasks[n] = pieces[n] * rounds;
  }
  pool.ForNodes(
      std::span(tasks.data(), shares.count()),
      [&](int node, int64_t task, int thread) {
        const int64_t begin = shares.begin(node) + task % pieces[node] * width;
        body(task / pieces[node], TileRange{begin, std::min(begin + width, shares.end(node))},
             thread);
      },
      when_done);
}

}  // namespace cpumoe
