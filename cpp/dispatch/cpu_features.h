// Which ISA variants exist and which of them this CPU can run. The list comes from
// cmake/Variants.cmake.
#pragma once

#include <string>
#include <vector>

#include "dispatch/amx_support.h"
#include "dispatch/machine.h"

namespace cpumoe {

struct IsaRow {
  std::string name;
  bool built;                         // part of this installation
  std::vector<std::string> features;  // CPU features needed
};

// All known ISAs, from the most general to the most special.
const std::vector<IsaRow>& KnownIsas();

// The advertised features whose registers the operating system saves; those that need
// tiles also need every one of `steps` to have passed.
FeatureSet UsableFeatures(const MachineAnswers& machine, const std::vector<TileStep>& steps);

// UsableFeatures of this machine, which is asked once. To be called before worker threads start:
// asking it replaces the SIGILL action for a moment.
FeatureSet DetectFeatures();

// How this machine answered.
const std::vector<TileStep>& DetectTileSteps();

// Makes DetectFeatures report `features` too. For tests that run a variant under an instruction
// emulator; without one, a variant that the CPU lacks ends the process with SIGILL.
void AssumeFeatures(const FeatureSet& features);

std::vector<std::string> MissingFeatures(const IsaRow& isa, const FeatureSet& cpu);

// Names of the built ISAs that `cpu` can run, in the order of KnownIsas.
std::vector<std::string> SupportedIsas(const FeatureSet& cpu);

// The row called `name`, if it is built and `cpu` can run it; else throws std::invalid_argument
// that says what is missing and what would work. `origin` names who asked, e.g. "CPUMOE_ISA".
const IsaRow& RequireIsa(const std::string& name, const FeatureSet& cpu, const std::string& origin);

}  // namespace cpumoe
