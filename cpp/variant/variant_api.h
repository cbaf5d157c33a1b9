// The exports of a variant library (one per ISA, opened with dlopen): one C function, which returns
// one table. The library also exports its build id (variant/build_id.h).
//
// The operators behind Moe and Linear are created and destroyed in their own library. The caller
// and the library must come from one build, which the build id proves, because a Workspace's
// vectors grow in one of them and are freed in the other. The caller and the library are compiled
// for different CPUs, so no SIMD type crosses this border. Exceptions do cross it, and all of them
// derive from std::exception.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "formats/weight_format.h"
#include "linear/linear.h"
#include "moe/moe.h"

namespace cpumoe {

// A loop that does the multiply-adds of a path and nothing else (kernels/limits-inl.h). Returns the
// multiply-accumulates done.
using PeakLoop = int64_t (*)(int64_t rounds);

// How many tokens of an expert the few-token kernels take (Precision::kBf16).
struct FewTokens {
  int crossover;  // the most tokens for which few-token kernels are used
  int most;       // the most tokens for which few-token kernels exist
};

struct AttentionArgs;    // attention/attention.h
struct WeightedSumArgs;  // moe/weighted_sum.h

// A row of the format table. Rows may have one name (weight_format.h).
struct FormatEntry {
  const char* row;  // no other row has this name
  FormatInfo info;
  // The caller deletes what these return. They throw std::invalid_argument.
  Moe* (*create)(const MoeConfig& config);
  Linear* (*create_linear)(const LinearConfig& config);
  std::array<PeakLoop, 2> peaks;  // for many tokens, by Precision
  FewTokens few_tokens;
};

struct VariantApi {
  const char* isa;  // the ISA that the library was compiled for
  size_t num_formats;
  const FormatEntry* formats;
  void (*read)(const float* data, int64_t count);  // count must be a multiple of kReadGranule
  // Copies past the caches, where the ISA can. `bytes` must be a multiple of kCopyGranule, and `to`
  // a multiple of 64.
  void (*copy)(std::byte* to, const std::byte* from, int64_t bytes);
  // Only one thread at a time may call it with given scratch memory.
  void (*attend)(const AttentionArgs& args, ThreadPool& pool, ScratchMemory& scratch);
  // Any threads may call it. Addresses and numbers are not checked.
  void (*weighted_sum)(const WeightedSumArgs& args, ThreadPool& pool);
};

inline constexpr int64_t kReadGranule = 1024;
inline constexpr int64_t kCopyGranule = 1024;

using VariantApiFunction = const VariantApi* (*)();
inline constexpr char kVariantApiSymbol[] = "cpumoe_variant_api";

}  // namespace cpumoe
