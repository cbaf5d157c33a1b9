// Whether this process may use tile registers (AMX). CPUID's feature bits are only part of the
// answer. Hypervisors advertise AMX with an empty palette, Linux wants to be asked for permission,
// and on some machines the instructions trap even then.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dispatch/machine.h"

namespace cpumoe {

// The bits of XCR0 for tile configuration and tile data.
inline constexpr uint64_t kTileState = uint64_t{1} << 17 | uint64_t{1} << 18;

// Whether the instructions of a CPU feature use tile registers.
bool NeedsTiles(const std::string& feature);

struct TileStep {
  std::string name;            // e.g. "palette"
  std::string question;        // the condition to be met
  std::optional<bool> passed;  // empty if not asked, because an earlier step failed
  std::string found;           // details, may be empty
};

// Takes all steps in order. The last two steps change the process: one asks for permission, and one
// executes an instruction that may trap. They are taken only if all others have passed.
std::vector<TileStep> TakeTileSteps(const MachineAnswers& machine);

bool TileStateUsable(const std::vector<TileStep>& steps);

}  // namespace cpumoe
