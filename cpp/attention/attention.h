// The interface of attention: softmax(scale * q k^T + mask) v, for grouped heads.
#pragma once

#include <cstdint>

#include "base/float_types.h"
#include "paths/scratch_memory.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// A tensor [batch, heads, rows, columns]. Columns follow one another, and the other strides are
// elements. A stride of zero repeats what is there.
template <class Pointer>
struct HeadsOf {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  // The index of the first element of a row.
  int64_t Row(int64_t batch, int64_t head, int64_t row) const {
    return batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// What a mask has for a query and a key: a byte that is zero if the query must not see the key, or
// a number that is added to the score.
enum class MaskType : int32_t { kNone, kBool, kBf16, kFp16, kFp32 };

struct AttentionArgs {
  DType dtype = DType::kBf16;  // of q, k, v and output
  int64_t batch = 0;
  int64_t heads = 0;     // of q
  int64_t kv_heads = 0;  // of k and v; divides heads. Successive heads of q share one.
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t head_size = 0;   // of q and k
  int64_t value_size = 0;  // of v
  float scale = 1.0f;      // of q k^T
  float softcap = 0.0f;    // scores become softcap * tanh(score / softcap); 0: they stay
  // Whether query t sees no key after t + keys - queries, so that the last query sees the last key.
  bool causal = false;
  int64_t window = 0;  // of these keys it sees the last `window`; 0: all. Needs `causal`.
  HeadsOf<const void*> q, k, v;
  HeadsOf<void*> output;  // [batch, heads, queries, value_size]
  MaskType mask_type = MaskType::kNone;
  HeadsOf<const void*> mask;     // [batch, heads, queries, keys]
  const float* sinks = nullptr;  // [heads]: a score that takes part in the softmax without a value
};

}  // namespace cpumoe
