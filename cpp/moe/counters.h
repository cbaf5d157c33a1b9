// Counts of the work of a layer's calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace cpumoe {

// Several calls may add at once. A call adds at the end of each of its rounds.
struct LayerCounters {
  explicit LayerCounters(int64_t num_experts) : expert_tokens(num_experts) {}

  std::vector<std::atomic<int64_t>> expert_tokens;  // tokens that each expert has computed
  // Bytes of weights, each counted whenever a round has tokens for its expert.
  std::atomic<int64_t> bytes_read{0};
};

}  // namespace cpumoe
