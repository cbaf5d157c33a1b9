// The product of one expert's tokens with pairs of tiles, as kernels write it. The 16 sums of a
// token and a tile are fp32 and follow one another, in the order
//
//   [pair][block of tokens][tile of the pair][token of the block][row of the tile]
//
// A kernel computes one block at a time, [tile][token][16], whose place depends on its size.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/tile.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

// Returns the 16 sums of a token and a tile in c [tile][token][16], the product of a block of
// `tokens` tokens.
inline __attribute__((always_inline)) float* SumsAt(float* c, int tile, int token, int tokens) {
  return c + (tile * tokens + token) * kTileRows;
}

// A view of the memory that holds a product.
class Product {
 public:
  Product(float* sums, const TokenBlocks& blocks) : sums_(sums), blocks_(blocks) {}

  // The number of fp32 sums of `tokens` tokens with so many pairs.
  static constexpr int64_t Size(int64_t pairs, int64_t tokens) {
    return pairs * tokens * TilePair::kCount * kTileRows;
  }

  const TokenBlocks& blocks() const { return blocks_; }

  // The product with one pair alone.
  Product Pair(int64_t pair) const { return {sums_ + Size(pair, blocks_.tokens()), blocks_}; }

  // The sums of a block's token and a tile. Those of the block's later tokens follow.
  float* At(int64_t pair, int64_t block, int tile = 0, int token = 0) const {
    float* c = sums_ + Size(pair, blocks_.tokens()) + Size(1, blocks_.Begin(block));
    return SumsAt(c, tile, token, blocks_.Size(block));
  }

  // Sets the product with the first `pairs` pairs to zero.
  void Clear(int64_t pairs) const {
    std::memset(sums_, 0, sizeof(float) * Size(pairs, blocks_.tokens()));
  }

 private:
  float* sums_;
  TokenBlocks blocks_;
};

}  // namespace cpumoe
