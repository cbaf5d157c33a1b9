// Packs several experts at once.
#pragma once

#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "base/check.h"
#include "moe/moe.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// Throws std::out_of_range unless all experts exist, and std::invalid_argument unless they have
// different copies, because threads pack several experts at once.
inline void RequireDistinct(const MoeConfig& config, std::span<const int64_t> experts) {
  std::vector<uint8_t> seen(config.copies(), 0);
  for (const int64_t expert : experts) {
    config.RequireExperts(expert, 1);
    uint8_t& copy = seen[config.CopyOf(expert)];
    Require(copy == 0, "experts: expected each expert once, got ", expert, " or its replica twice");
    copy = 1;
  }
}

// Packs sources[i] as expert experts[i]. Throws std::out_of_range, and std::invalid_argument if an
// expert or its replica is named twice, before anything is packed. After another error some of
// these experts have no weights.
//
// If there are enough experts for all threads, each thread packs whole experts. Threads then meet
// only once per call, and no two of them make the operating system clear the same huge page. Where
// experts are divided among nodes, the threads of each node pack the node's part of every expert.
inline void PackExperts(Moe& moe, std::span<const int64_t> experts,
                        std::span<const ExpertSource> sources, ThreadPool& pool) {
  const int64_t count = std::ssize(sources);
  RequireDistinct(moe.config(), experts);
  if (count < pool.num_threads() || moe.config().nodes.size() > 1) {
    for (int64_t i = 0; i < count; ++i) moe.Pack(experts[i], sources[i], pool);
    return;
  }
  pool.For(count, [&](int64_t i, int) {
    SerialPool serial;
    moe.Pack(experts[i], sources[i], serial);
  });
}

}  // namespace cpumoe
