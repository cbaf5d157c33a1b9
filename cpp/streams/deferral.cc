#include "streams/deferral.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/bits.h"

namespace cpumoe {
namespace {

// Whether slot `slot` is among the `kept` greatest of a token's weights.
bool IsAmongGreatest(const float* weights, int64_t top_k, int64_t slot, int64_t kept) {
  int64_t greater = 0;
  for (int64_t other = 0; other < top_k; ++other) {
    const bool equal_and_before = weights[other] == weights[slot] && other < slot;
    if (weights[other] > weights[slot] || equal_and_before) ++greater;
  }
  return greater < kept;
}

template <class Element>
void Convert(const float* from, int64_t count, Element* to, ThreadPool& pool) {
  constexpr int64_t kChunk = 4096;
  pool.For(CeilDiv(count, kChunk), [&](int64_t chunk, int) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) to[i] = Element::FromFloat(from[i]);
  });
}

}  // namespace

template <class Id>
bool ExpertSplit::Move(Id* ids, const float* weights, int64_t tokens, int64_t top_k,
                       int64_t deferred, int64_t num_experts) {
  const int64_t pairs = tokens * top_k;
  const auto is_expert = [&](Id id) { return id >= 0 && id < num_experts; };
  is_now_.assign(num_experts, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t slot = pair % top_k;
    if (is_expert(ids[pair]) &&
        IsAmongGreatest(weights + (pair - slot), top_k, slot, top_k - deferred)) {
      is_now_[ids[pair]] = 1;
    }
  }
  later_ids_.resize(pairs);  // is enough for either width
  Id* const later = reinterpret_cast<Id*>(later_ids_.data());
  bool any = false;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const bool moves = is_expert(ids[pair]) && is_now_[ids[pair]] == 0;
    later[pair] = moves ? std::exchange(ids[pair], Id{-1}) : Id{-1};
    any = any || moves;
  }
  return any;
}

template bool ExpertSplit::Move(int32_t*, const float*, int64_t, int64_t, int64_t, int64_t);
template bool ExpertSplit::Move(int64_t*, const float*, int64_t, int64_t, int64_t, int64_t);

void ConvertTo(DType dtype, const float* from, int64_t count, void* to, ThreadPool& pool) {
  switch (dtype) {
    case DType::kBf16:
      return Convert(from, count, static_cast<Bf16*>(to), pool);
    case DType::kFp16:
      return Convert(from, count, static_cast<Fp16*>(to), pool);
    case DType::kFp32:
      std::memcpy(to, from, count * sizeof(float));
  }
}

}  // namespace cpumoe
