// How the work of attention is cut into tasks. The cuts depend on sizes alone, never on threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "base/bits.h"
#include "kernels/tile.h"

namespace cpumoe {

// The keys [begin, end).
struct KeyRange {
  int64_t begin, end;
};

// The heads that share keys form a group. A row is a query of one head of a group: row r is query
// r / group of the group's head r % group. Thus rows that follow one another share their keys. A
// unit is a block of rows of one group. If there are few units, the keys that a unit sees are cut
// into chunks, which are computed on their own and then merged.
class AttentionPlan {
 public:
  // `row_step` is the number of rows that kernels take at once.
  AttentionPlan(const AttentionArgs& args, int row_step)
      : args_(args),
        group_(args.heads / args.kv_heads),
        values_(RoundUp(args.value_size, int64_t{kTileRows})),
        block_keys_(args.head_size + args.value_size > kWide ? 32 : 64) {
    const int64_t rows = args.queries * group_;
    const int64_t fixed = block_keys_ * (args.head_size + values_);
    const int64_t each = args.head_size + values_ + block_keys_;
    const int64_t fit = std::clamp((kScratchFloats - fixed) / each, int64_t{row_step}, kMostRows);
    blocks_ = CeilDiv(rows, fit / row_step * row_step);
    rows_ = CeilDiv(rows, blocks_);
    const int64_t units = this->units();
    const int64_t visible = std::max<int64_t>(MostVisible(), 1);
    const int64_t wanted = std::min(CeilDiv(kTasks, units), visible / kLeastChunk);
    chunk_keys_ = RoundUp(CeilDiv(visible, std::max<int64_t>(wanted, 1)), block_keys_);
    chunks_ = CeilDiv(visible, chunk_keys_);
  }

  int64_t group() const { return group_; }
  int64_t values() const { return values_; }          // value_size in whole vectors
  int64_t block_keys() const { return block_keys_; }  // keys that kernels take at once
  int64_t rows() const { return rows_; }              // most rows of a unit
  int64_t blocks() const { return blocks_; }          // of rows, in each group
  int64_t units() const { return args_.batch * args_.kv_heads * blocks_; }
  int64_t chunks() const { return chunks_; }  // of each unit

  // The keys that a query sees, apart from its mask.
  KeyRange Visible(int64_t query) const {
    if (!args_.causal) return {0, args_.keys};
    const int64_t end = query + args_.keys - args_.queries + 1;
    return Clamped(args_.window == 0 ? 0 : end - args_.window, end);
  }
  // The keys of a chunk that some query in [first, last] sees.
  KeyRange Chunk(int64_t first, int64_t last, int64_t chunk) const {
    const int64_t begin = Visible(first).begin + chunk * chunk_keys_;
    return Clamped(begin, std::min(begin + chunk_keys_, Visible(last).end));
  }

 private:
  // The scratch memory of a task should stay in a core's L2.
  static constexpr int64_t kScratchFloats = (int64_t{320} << 10) / 4;
  static constexpr int64_t kMostRows = 128;
  static constexpr int64_t kWide = 512;
  // With so many tasks, a few dozen threads share the keys of one query evenly.
  static constexpr int64_t kTasks = 128;
  static constexpr int64_t kLeastChunk = 128;

  KeyRange Clamped(int64_t begin, int64_t end) const {
    begin = std::clamp<int64_t>(begin, 0, args_.keys);
    return {begin, std::clamp(end, begin, args_.keys)};
  }
  // The most keys that the queries of a unit see.
  int64_t MostVisible() const {
    if (!args_.causal || args_.window == 0) return args_.keys;
    const int64_t queries = std::min(CeilDiv(rows_, group_) + 1, args_.queries);
    return std::min(args_.keys, args_.window - 1 + queries);
  }

  const AttentionArgs& args_;
  int64_t group_, values_, block_keys_;
  int64_t blocks_ = 0, rows_ = 0, chunk_keys_ = 0, chunks_ = 0;
};

}  // namespace cpumoe
