// The questions that feature detection asks the CPU and the operating system.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>

namespace cpumoe {

using FeatureSet = std::set<std::string>;

// Palette 1 of the tile registers (CPUID leaf 0x1D) and the limits of a product (leaf 0x1E). All
// fields are zero if the CPU has none.
struct TilePalette {
  int tiles;
  int rows;
  int row_bytes;
  int product_depth;      // TMUL_MAXK: rows of the second factor
  int product_row_bytes;  // TMUL_MAXN
};

// The answers of a machine. Tests make up answers for machines that we do not have.
struct MachineAnswers {
  FeatureSet advertised;         // those features of the ISA table that the CPU advertises
  std::optional<uint64_t> xcr0;  // states that the system saves; empty without OSXSAVE
  TilePalette palette = {};
  // Asks for permission to use tile data in this process. Returns 0, or the system's errno.
  std::function<int()> permit_tiles;
  // Returns whether a tile instruction executes. If not, it traps.
  std::function<bool()> execute_tile;
};

MachineAnswers AskMachine();

}  // namespace cpumoe
