// The shape of one layer's routed experts and the formula of their activation.
#pragma once

#include <cstdint>
#include <limits>

namespace cpumoe {

// h = (u + up_offset) * g * sigmoid(alpha * g), g = min(gate, limit), u = clamp(up, -limit, limit).
// Plain SwiGLU is the default; DeepSeek-V4 has limit 10; gpt-oss alpha 1.702, limit 7, up_offset 1.
struct SwiGlu {
  float alpha = 1.0f;
  float limit = std::numeric_limits<float>::infinity();
  float up_offset = 0.0f;
};

// What the products are computed from.
enum class ComputePath : int32_t {
  kBf16,  // activations in the ISA's floating point type, bf16 or fp32, or as integers of 14 or 21
          // bits (planes_path-inl.h); weights exact. In bf16 those of fp32 calls are only where the
          // call allows it (ForwardArgs)
  kInt8,  // activations rounded to int8 per token and group, weights exact; but see
          // mixed_path-inl.h
};

struct MoeConfig {
  int64_t num_experts = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  SwiGlu swiglu;
  bool has_bias = false;
  ComputePath compute = ComputePath::kBf16;
  // One kernel path whatever the number of tokens: a token's result does not depend on the others.
  bool batch_invariant = false;
  // Most tokens of an expert that the few-token kernels take; negative: the ISA's crossover.
  int fused_tokens = -1;
};

}  // namespace cpumoe
