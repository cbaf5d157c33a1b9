// Whether this process may use tile registers (AMX). CPUID's feature bits are only part of the
// answer: hypervisors advertise AMX with an empty palette, the kernel wants to be asked, and there
// are machines where the instructions trap all the same.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dispatch/machine.h"

namespace cpumoe {

// XCR0's bits of tile configuration and tile data.
inline constexpr uint64_t kTileState = uint64_t{1} << 17 | uint64_t{1} << 18;

// Whether a CPU feature's instructions use tile registers.
bool NeedsTiles(const std::string& feature);

struct TileStep {
  std::string name;            // e.g. "palette"
  std::string question;        // what has to hold
  std::optional<bool> passed;  // none: not asked, because an earlier step failed
  std::string found;           // details, may be empty
};

// All steps in order. The last two change the process (it asks for permission and executes an
// instruction that may trap), and are taken only where the others have passed.
std::vector<TileStep> TakeTileSteps(const MachineAnswers& machine);

bool TileStateUsable(const std::vector<TileStep>& steps);

}  // namespace cpumoe
