// Scratch memory of forward calls. It grows to the largest call and is then reused, so later calls
// allocate nothing. One workspace serves all layers that run on a pool, one call at a time.
#pragma once

#include <cstddef>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/token_blocks.h"
#include "moe/routing.h"

namespace cpumoe {

class Workspace {
 public:
  // Uninitialised memory. It is valid until the next request for that buffer.
  std::byte* Activations(size_t bytes) { return Grow(activations_, bytes); }
  std::byte* Intermediate(size_t bytes) { return Grow(intermediate_, bytes); }

  // Makes Scratch(t) return at least `bytes` for each of `threads` threads.
  void ReserveScratch(int threads, size_t bytes) {
    if (scratch_.size() < static_cast<size_t>(threads)) scratch_.resize(threads);
    for (AlignedBuffer& buffer : scratch_) Grow(buffer, bytes);
  }
  std::byte* Scratch(int thread) const { return scratch_[thread].data(); }

  Routing& routing() { return routing_; }

  // An expert that a round computes, and what the round decides once for all of its tasks.
  struct Expert {
    int64_t id;          // of the packed copy
    int64_t begin;       // the expert's first pair, as an index into the routing's tokens()
    TokenBlocks blocks;  // the expert's pairs
    StagedForm form;     // the kernels that multiply them
    bool fold;           // whether these kernels may fold scales (TilePair::fold)
  };
  std::vector<Expert>& experts() { return experts_; }

  // A block of one expert's tokens: its `tokens` pairs from index `pair` on, and where they are
  // staged.
  struct Block {
    int64_t pair;
    int tokens;
    StagedForm form;
    std::byte* staged;
  };
  std::vector<Block>& blocks() { return blocks_; }

 private:
  static std::byte* Grow(AlignedBuffer& buffer, size_t bytes) {
    if (buffer.size() < bytes) {
      buffer = AlignedBuffer();  // frees the old buffer before the new one is allocated
      buffer = AlignedBuffer(bytes);
    }
    return buffer.data();
  }

  AlignedBuffer activations_;
  AlignedBuffer intermediate_;
  std::vector<AlignedBuffer> scratch_;
  Routing routing_;
  std::vector<Expert> experts_;
  std::vector<Block> blocks_;
};

}  // namespace cpumoe
