// The shape of one layer's routed experts and the formula of their activation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "base/check.h"
#include "base/memory_node.h"
#include "paths/kernel_options.h"

namespace cpumoe {

// f of a gated linear unit.
enum class GluFunction : int32_t {
  kSilu,      // g * sigmoid(alpha * g)
  kGeluTanh,  // g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)), the tanh form of GELU
  kRelu,      // max(g, 0)
  kRelu2,     // max(g, 0)^2
  // cap(g, gate_cap) * sigmoid(g), with cap(u, up_cap) for u, where cap(x, c) = c * tanh(x / c).
  kSoftCappedSilu,
  kGelu,  // g * Phi(g), Phi(g) = (1 + erf(g / sqrt(2))) / 2
};

// A gated linear unit: h = (u + up_offset) * f(g), g = min(gate, limit), u = clamp(up, -limit,
// limit). Experts without a gate projection have h = f(g), g = min(up, limit).
//
// Plain SwiGLU is the default. DeepSeek-V4 has limit 10. gpt-oss has alpha 1.702, limit 7 and
// up_offset 1. Gemma 4 has kGeluTanh.
struct Glu {
  GluFunction function = GluFunction::kSilu;
  float alpha = 1.0f;  // of kSilu
  float limit = std::numeric_limits<float>::infinity();
  float up_offset = 0.0f;
  float gate_cap = 1.0f;  // of kSoftCappedSilu
  float up_cap = 1.0f;    // of kSoftCappedSilu
  bool gated = true;      // whether experts have a gate projection
};

struct MoeConfig {
  int64_t num_experts = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  Glu glu;
  bool has_bias = false;
  Precision precision = Precision::kBf16;
  // Always takes the kernels that serve any number of tokens, so that a token's result does not
  // depend on the other tokens of its batch.
  bool batch_invariant = false;
  // Most tokens of an expert that the few-token kernels take. If negative, the path's own limit
  // decides.
  int few_token_limit = -1;
  // [num_experts], the packed copy that serves each expert; empty: each expert has a copy of its
  // own. Experts with one copy are replicas. Copies are numbered from 0 without gaps.
  std::vector<int32_t> copy_of = {};
  // The nodes among whose memories the rows of all matrices are divided; empty: the system chooses
  // the memory. A runtime has the nodes of its threads (Runtime::nodes).
  std::vector<MemoryNode> nodes = {};

  KernelOptions kernels() const { return {precision, batch_invariant, few_token_limit}; }
  int64_t CopyOf(int64_t expert) const { return copy_of.empty() ? expert : copy_of[expert]; }
  int64_t copies() const {
    return copy_of.empty() ? num_experts : *std::ranges::max_element(copy_of) + int64_t{1};
  }
  // Throws std::out_of_range unless experts [first, first + count) exist. `count` is not negative.
  void RequireExperts(int64_t first, int64_t count) const {
    if (first >= 0 && first <= num_experts && count <= num_experts - first) return;
    const int64_t missing = first < 0 || first >= num_experts ? first : num_experts;
    throw std::out_of_range(
        Message("expert ", missing, " is not one of the layer's ", num_experts));
  }
};

}  // namespace cpumoe
