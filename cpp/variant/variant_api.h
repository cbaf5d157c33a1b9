// What a variant library (one per ISA, opened with dlopen) exports: one C function, one table. (The
// library also exports its build id, variant/build_id.h.)
//
// The operators behind Moe are made and destroyed in the library that they came from. Both sides
// must come from one build, which the build id proves: a Workspace's vectors grow in one and are
// freed in the other. Both sides are compiled for different CPUs, so no SIMD type crosses this
// border. Exceptions cross it; all derive from std::exception.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/weight_format.h"
#include "moe/moe.h"

namespace cpumoe {

struct FormatEntry {
  FormatInfo info;
  Moe* (*create)(const MoeConfig& config);  // the caller deletes; throws std::invalid_argument
};

// The multiply-adds of a precision's path and nothing else (kernels/limits-inl.h).
struct PeakEntry {
  const char* precision;           // "bf16" or "int8"
  int64_t (*run)(int64_t rounds);  // returns the multiply-accumulates done
};

// Numbers of an expert's tokens that the few-token kernels of a variant take (Precision::kBf16).
struct FewTokens {
  int crossover;  // up to which they are used
  int most;       // that there are kernels for
};

struct VariantApi {
  const char* isa;  // the ISA that the library was compiled for
  size_t num_formats;
  const FormatEntry* formats;
  size_t num_peaks;
  const PeakEntry* peaks;
  void (*read)(const float* data, int64_t count);  // count: a multiple of kReadGranule
  FewTokens few_tokens;
};

inline constexpr int64_t kReadGranule = 1024;

using VariantApiFunction = const VariantApi* (*)();
inline constexpr char kVariantApiSymbol[] = "cpumoe_variant_api";

}  // namespace cpumoe
