// Groups a call's (token, slot) pairs by expert.
#pragma once

#include <cstdint>
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
class Routing {
 public:
  struct Expert {
    int64_t id;
    // The expert's first pair, as an index into tokens() and weights().
    int64_t begin;
    int64_t count;
  };

  // Takes tokens [begin, end) of `input`. `has_weights[e]` says whether expert e was packed. Throws
  // std::out_of_range for an id that no host may pass, and std::invalid_argument for an expert that
  // was not packed.
  void Build(const RoutingInput& input, int64_t begin, int64_t end,
             const std::vector<uint8_t>& has_weights) {
    const int64_t num_experts = static_cast<int64_t>(has_weights.size());
    counts_.assign(num_experts, 0);
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
      chosen_[i - first] = mine ? static_cast<int32_t>(id) : -1;
      if (mine) ++counts_[id];
    }
    int64_t total = 0;
    for (int64_t id = 0; id < num_experts; ++id) {
      if (counts_[id] == 0) continue;
      Require(has_weights[id] != 0, "expert ", id,
              " has no weights, but a token is routed to it; pack it first");
      experts_.push_back({id, total, counts_[id]});
      total += counts_[id];
      counts_[id] = total - counts_[id];  // from here on the place of the expert's next pair
    }
    tokens_.resize(total);
    weights_.resize(total);
    for (int64_t i = first; i < last; ++i) {
      const int32_t id = chosen_[i - first];
      if (id < 0) continue;
      const int64_t place = counts_[id]++;
      tokens_[place] = static_cast<int32_t>(i / input.top_k - begin);
      weights_[place] = input.weights[i];
    }
  }

  const std::vector<Expert>& experts() const { return experts_; }
  const std::vector<int32_t>& tokens() const {
    return tokens_;
  }  // relative to the first token taken
  const std::vector<float>& weights() const { return weights_; }

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

  std::vector<uint8_t> masked_;
  // The id of every pair, -1 if skipped. A copy, because the host may change its ids meanwhile.
  std::vector<int32_t> chosen_;
  std::vector<int64_t> counts_;
  std::vector<Expert> experts_;
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
};

}  // namespace cpumoe
