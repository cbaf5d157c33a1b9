// Access to the kernels of one ISA below the operator, by a second table of the variant's library.
// Only builds with tests have this table. Tests get it from IsaRun::probe().
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tile.h"
#include "moe/config.h"

namespace cpumoe::kernel_probe {

enum class Path { kFused, kFoldedPanel, kScaledPanel, kInt8, kDigits, kDigitsOfBf16 };

struct FormatEntry {
  const char* format;    // its row
  bool folds;            // whether kFoldedPanel exists
  bool scales_sums;      // whether kScaledPanel exists
  bool digits;           // whether kDigits and kDigitsOfBf16 exist
  bool int8;             // whether kInt8 exists
  int64_t fused_tokens;  // most tokens of kFused
  int64_t panel_tokens;  // MR of the panel paths
  int64_t panel_groups;  // groups of a whole panel
  bool panel_unit;       // a unit multiplies panels, with its own order of sums
  bool wide;             // the floating point kernels are those of Isa::Wide
  int activation_bits;   // significant bits of these kernels' activations: 8 for bf16, 24 for fp32
  int64_t int8_tokens;   // MR of kInt8: fused for up to so many tokens, panel for more

  // Whether kFoldedPanel may be used with scales of these magnitudes.
  bool (*folds_exactly)(float least_scale, float greatest_scale);

  // c [tokens, count * 16] = a [tokens, K] * tiles^T, with K = groups * group size. `count` is 1 or
  // 2. Throws std::invalid_argument if a path does not take these arguments.
  void (*multiply)(Path path, const TileView* tiles, int count, int64_t groups, const float* a,
                   int64_t tokens, float* c);
};

struct Api {
  const char* isa;
  void (*exp)(const float* in, float* out, int64_t count);  // count must be a multiple of 16
  void (*activate)(const Glu& glu, const float* gate, const float* up, float* out, int64_t count);
  size_t num_formats;
  const FormatEntry* formats;
};

using ApiFunction = const Api* (*)();
inline constexpr char kApiSymbol[] = "cpumoe_kernel_probe";

}  // namespace cpumoe::kernel_probe
