// Groups a call's (token, slot) pairs by expert.
#pragma once

#include <atomic>
#include <cstdint>
#include <iterator>
#include <span>
#include <stdexcept>
#include <vector>

#include "base/check.h"

namespace cpumoe {

// The router's choice for the tokens of a call. Hosts use the ids -1 and num_experts for "not
// mine". Such ids are skipped, and so is an expert whose mask byte is not zero.
struct RoutingInput {
  const void* ids = nullptr;  // [tokens, top_k] int32 or int64
  bool ids_are_64_bit = false;
  const float* weights = nullptr;  // [tokens, top_k]
  const uint8_t* mask = nullptr;   // [num_experts], may be null
  int64_t top_k = 0;

  int64_t Id(int64_t index) const {
    return ids_are_64_bit ? static_cast<const int64_t*>(ids)[index]
                          : int64_t{static_cast<const int32_t*>(ids)[index]};
  }
};

// The pairs of a call in order of expert, then token, then slot. Sums are computed in this order.
// Replicas (MoeConfig::copy_of) count as one expert here.
class Routing {
 public:
  struct Expert {
    int64_t id;  // of the packed copy
    // The expert's first pair, as an index into tokens() and weights().
    int64_t begin;
    int64_t count;
  };

  // Takes tokens [begin, end) of `input`. `has_weights[c]` says whether copy c was packed, and
  // `copy_of` is MoeConfig's. Throws std::out_of_range for an id that no host may pass, and
  // std::invalid_argument for an expert that was not packed.
  void Build(const RoutingInput& input, int64_t begin, int64_t end,
             const std::vector<uint8_t>& has_weights, std::span<const int32_t> copy_of = {}) {
    const int64_t num_experts = copy_of.empty() ? std::ssize(has_weights) : std::ssize(copy_of);
    places_.assign(has_weights.size(), 0);
    tokens_of_id_.assign(copy_of.size(), 0);
    experts_.clear();
    // Copies the mask, because the host may change it at any time and both passes below must use
    // one mask.
    masked_.assign(num_experts, 0);
    if (input.mask != nullptr) masked_.assign(input.mask, input.mask + num_experts);
    const int64_t first = begin * input.top_k, last = end * input.top_k;
    chosen_.resize(last - first);
    for (int64_t i = first; i < last; ++i) {
      const int64_t id = input.Id(i);
      const bool mine = IsMine(input, i, id);
      const int64_t copy = !mine ? -1 : copy_of.empty() ? id : copy_of[id];
      chosen_[i - first] = static_cast<int32_t>(copy);
      if (mine) ++places_[copy];
      if (mine && !copy_of.empty()) ++tokens_of_id_[id];
    }
    int64_t total = 0;
    for (int64_t copy = 0; copy < std::ssize(places_); ++copy) {
      const int64_t count = places_[copy];
      if (count == 0) continue;
      if (has_weights[copy] == 0) ThrowNoWeights(copy, copy_of);
      experts_.push_back({copy, total, count});
      places_[copy] = total;
      total += count;
    }
    tokens_.resize(total);
    weights_.resize(total);
    for (int64_t i = first; i < last; ++i) {
      const int32_t copy = chosen_[i - first];
      if (copy < 0) continue;
      const int64_t place = places_[copy]++;
      tokens_[place] = static_cast<int32_t>(i / input.top_k - begin);
      weights_[place] = input.weights[i];
    }
  }

  const std::vector<Expert>& experts() const { return experts_; }
  const std::vector<int32_t>& tokens() const {
    return tokens_;
  }  // relative to the first token taken
  const std::vector<float>& weights() const { return weights_; }

  // Adds the number of tokens of each expert, by the host's id of it.
  void CountTokens(std::span<std::atomic<int64_t>> expert_tokens) const {
    if (tokens_of_id_.empty()) {  // without replicas
      for (const Expert& expert : experts_) Add(expert_tokens[expert.id], expert.count);
    }
    for (int64_t id = 0; id < std::ssize(tokens_of_id_); ++id) {
      Add(expert_tokens[id], tokens_of_id_[id]);
    }
  }

 private:
  bool IsMine(const RoutingInput& input, int64_t index, int64_t id) const {
    const auto num_experts = static_cast<int64_t>(masked_.size());
    if (id == -1 || id == num_experts) return false;
    if (id < -1 || id > num_experts) {
      throw std::out_of_range(Message("topk_ids[", index / input.top_k, ", ", index % input.top_k,
                                      "]: expert ids must be in [0, ", num_experts, "), or -1 or ",
                                      num_experts, " for an expert to skip; got ", id));
    }
    return masked_[id] == 0;
  }

  [[noreturn]] void ThrowNoWeights(int64_t copy, std::span<const int32_t> copy_of) const {
    int64_t id = copy;
    for (int64_t i = std::ssize(copy_of) - 1; i >= 0; --i) {
      if (copy_of[i] == copy && tokens_of_id_[i] > 0) id = i;
    }
    throw std::invalid_argument(
        Message("expert ", id, " has no weights, but a token is routed to it; pack it first"));
  }

  static void Add(std::atomic<int64_t>& counter, int64_t count) {
    if (count != 0) counter.fetch_add(count, std::memory_order_relaxed);
  }

  std::vector<uint8_t> masked_;
  // The packed copy for every pair, -1 if skipped. The host may change its ids meanwhile.
  std::vector<int32_t> chosen_;
  std::vector<int64_t> places_;        // of the next pair of each packed copy
  std::vector<int64_t> tokens_of_id_;  // pairs of each of the host's ids; empty without replicas
  std::vector<Expert> experts_;
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
};

}  // namespace cpumoe
