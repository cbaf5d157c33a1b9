// Packs several experts at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "moe/moe.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// Packs sources[i] as expert first + i. Throws std::out_of_range before anything is packed. After
// another error some of these experts have no weights.
//
// If there are enough experts for all threads, each thread packs whole experts. Threads then meet
// only once per call, and no two of them make the operating system clear the same huge page.
inline void PackExperts(Moe& moe, int64_t first, std::span<const ExpertSource> sources,
                        ThreadPool& pool) {
  const auto count = static_cast<int64_t>(sources.size());
  moe.config().RequireExperts(first, count);
  if (count < pool.num_threads()) {
    for (int64_t i = 0; i < count; ++i) moe.Pack(first + i, sources[i], pool);
    return;
  }
  pool.For(count, [&](int64_t i, int) {
    SerialPool serial;
    moe.Pack(first + i, sources[i], serial);
  });
}

}  // namespace cpumoe
