// Cuts the tokens of one expert into blocks of at most MR tokens for the micro-kernels.
#pragma once

#include <cstdint>
#include <limits>

#include "base/bits.h"

namespace cpumoe {

// As a limit: any number of tokens.
inline constexpr int kAnyTokens = std::numeric_limits<int>::max();

// With at most this many tokens of an expert, the bytes of the weights matter more than those of
// the activations. Weights are then read without a gap.
inline constexpr int kStreamedTokens = 32;

// The kernels that a block of tokens is staged for: those that multiply bytes, or the fused or the
// panel kernel, which multiply floating point numbers.
enum class StagedForm { kBytes, kFused, kPanel };
inline constexpr StagedForm kStagedForms[] = {StagedForm::kBytes, StagedForm::kFused,
                                              StagedForm::kPanel};

// Cuts `tokens` into as few blocks as possible, of at most `most` tokens each. Sizes of blocks
// differ by at most one. Fifteen tokens with MR = 14 become 8 + 7 and not 14 + 1, because a block
// of one token reads the weights as often as a block of 14.
class TokenBlocks {
 public:
  TokenBlocks(int64_t tokens, int most)
      : tokens_(tokens),
        count_(CeilDiv(tokens, most)),
        size_(count_ == 0 ? 0 : tokens / count_),
        larger_(count_ == 0 ? 0 : tokens % count_) {}

  // The smallest block where there are several: of most + 1 tokens, half of them rounded down.
  static constexpr int FewestOfSeveral(int most) { return (most + 1) / 2; }

  int64_t tokens() const { return tokens_; }
  int64_t count() const { return count_; }
  int64_t Begin(int64_t block) const { return block * size_ + (block < larger_ ? block : larger_); }
  int Size(int64_t block) const { return static_cast<int>(size_ + (block < larger_ ? 1 : 0)); }

 private:
  int64_t tokens_;
  int64_t count_;
  int64_t size_;
  int64_t larger_;  // the number of blocks, the first ones, that have one more token
};

}  // namespace cpumoe
