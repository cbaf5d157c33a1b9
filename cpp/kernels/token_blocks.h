// How the tokens of one expert are cut into blocks of at most MR for the micro-kernels.
#pragma once

#include <cstdint>

#include "base/bits.h"

namespace cpumoe {

// Up to so many tokens of an expert the weights' bytes count more than the activations': they are
// read without a gap.
inline constexpr int kStreamedTokens = 32;

// Which kernels a block of tokens is staged for: the bytes of a mixed path, or floating point
// numbers.
enum class StagedForm { kBytes, kFused, kPanel };
inline constexpr StagedForm kStagedForms[] = {StagedForm::kBytes, StagedForm::kFused,
                                              StagedForm::kPanel};

// `tokens` in as few blocks as `most` allows, whose sizes differ by one at most: fifteen tokens
// and MR = 14 are 8 + 7, not 14 + 1, because a block of one token reads the weights as often as one
// of 14.
class TokenBlocks {
 public:
  TokenBlocks(int64_t tokens, int most)
      : tokens_(tokens),
        count_(CeilDiv(tokens, most)),
        size_(count_ == 0 ? 0 : tokens / count_),
        larger_(count_ == 0 ? 0 : tokens % count_) {}

  int64_t tokens() const { return tokens_; }
  int64_t count() const { return count_; }
  int64_t Begin(int64_t block) const { return block * size_ + (block < larger_ ? block : larger_); }
  int Size(int64_t block) const { return static_cast<int>(size_ + (block < larger_ ? 1 : 0)); }

 private:
  int64_t tokens_;
  int64_t count_;
  int64_t size_;
  int64_t larger_;  // blocks of one token more, the first ones
};

}  // namespace cpumoe
