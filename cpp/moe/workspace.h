// Scratch memory of forward calls of experts. One workspace serves all layers that run on a pool,
// one call at a time.
#pragma once

#include <cstddef>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/token_blocks.h"
#include "moe/routing.h"
#include "paths/scratch_memory.h"

namespace cpumoe {

class Workspace : public ScratchMemory {
 public:
  // For staged intermediate features.
  std::byte* Intermediate(size_t bytes) { return Grow(intermediate_, bytes); }

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
  AlignedBuffer intermediate_;
  Routing routing_;
  std::vector<Expert> experts_;
  std::vector<Block> blocks_;
};

}  // namespace cpumoe
