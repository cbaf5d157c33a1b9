// How a caller wants a product to be computed: what decides the path and the kernels besides the
// ISA and the format.
#pragma once

#include <cstdint>

#include "kernels/token_blocks.h"

namespace cpumoe {

// The lowest precision to which activations may be rounded. Weights are always exact.
enum class Precision : int32_t {
  // The ISA's floating point type, or integers of 14 or 21 bits (digit_path-inl.h). An fp32 call is
  // rounded to bf16 only if the call allows it (ForwardArgs::fp32_as_bf16).
  kBf16,
  // int8 per token and group. Some paths are more precise (mixed_path-inl.h).
  kInt8,
};

struct KernelOptions {
  Precision precision = Precision::kBf16;
  // Always takes the kernels that serve any number of tokens, so that a token's result does not
  // depend on the other tokens of its batch.
  bool batch_invariant = false;
  // Most tokens that the few-token kernels take. If negative, the path's own limit decides.
  int few_token_limit = -1;
};

}  // namespace cpumoe
