// What feature detection asks of the CPU and the operating system.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>

namespace cpumoe {

using FeatureSet = std::set<std::string>;

// Palette 1 of the tile registers: CPUID leaf 0x1D, and the limits of a product from leaf 0x1E. All
// zero if the CPU has none.
struct TilePalette {
  int tiles;
  int rows;
  int row_bytes;
  int product_depth;      // TMUL_MAXK: rows of the second factor
  int product_row_bytes;  // TMUL_MAXN
};

// A machine's answers. Tests make them up for machines that we do not have.
struct MachineAnswers {
  FeatureSet advertised;         // of the features that the ISA table mentions
  std::optional<uint64_t> xcr0;  // the states that the system saves; none without OSXSAVE
  TilePalette palette = {};
  std::function<int()> permit_tiles;   // lets this process use tile data: 0, or the system's errno
  std::function<bool()> execute_tile;  // whether a tile instruction executes rather than traps
};

MachineAnswers AskMachine();

}  // namespace cpumoe
