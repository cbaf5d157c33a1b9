// The exports of a variant library (one per ISA, opened with dlopen): one C function, which returns
// one table. The library also exports its build id (variant/build_id.h).
//
// The operators behind Moe are created and destroyed in their own library. The caller and the
// library must come from one build, which the build id proves, because a Workspace's vectors grow
// in one of them and are freed in the other. The caller and the library are compiled for different
// CPUs, so no SIMD type crosses this border. Exceptions do cross it, and all of them derive from
// std::exception.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/weight_format.h"
#include "moe/moe.h"

namespace cpumoe {

struct FormatEntry {
  FormatInfo info;
  Moe* (*create)(const MoeConfig& config);  // the caller deletes it; throws std::invalid_argument
};

// A loop that does the multiply-adds of a precision's path and nothing else (kernels/limits-inl.h).
struct PeakEntry {
  const char* precision;           // "bf16" or "int8"
  int64_t (*run)(int64_t rounds);  // returns the multiply-accumulates done
};

// How many tokens of an expert the few-token kernels of a variant take (Precision::kBf16).
struct FewTokens {
  int crossover;  // the most tokens for which the variant uses few-token kernels
  int most;       // the most tokens for which few-token kernels exist
};

struct VariantApi {
  const char* isa;  // the ISA that the library was compiled for
  size_t num_formats;
  const FormatEntry* formats;
  size_t num_peaks;
  const PeakEntry* peaks;
  void (*read)(const float* data, int64_t count);  // count must be a multiple of kReadGranule
  // Copies past the caches, where the ISA can. `bytes` must be a multiple of kCopyGranule, and `to`
  // a multiple of 64.
  void (*copy)(std::byte* to, const std::byte* from, int64_t bytes);
  FewTokens few_tokens;
};

inline constexpr int64_t kReadGranule = 1024;
inline constexpr int64_t kCopyGranule = 1024;

using VariantApiFunction = const VariantApi* (*)();
inline constexpr char kVariantApiSymbol[] = "cpumoe_variant_api";

}  // namespace cpumoe
