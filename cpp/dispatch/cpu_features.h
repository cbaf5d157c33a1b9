// The ISA variants that exist, from cmake/Variants.cmake, and those that this CPU can run.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dispatch/amx_support.h"
#include "dispatch/machine.h"

namespace cpumoe {

struct IsaRow {
  std::string name;
  bool built;                         // whether this installation includes the variant
  std::vector<std::string> features;  // the CPU features that the variant needs
};

// All known ISAs, from the most general to the most special.
const std::vector<IsaRow>& KnownIsas();

// Returns the advertised features whose registers the operating system saves. Features that need
// tiles also need all `steps` to have passed.
FeatureSet UsableFeatures(const MachineAnswers& machine, const std::vector<TileStep>& steps);

// Returns UsableFeatures of this machine, which is asked only once. The first call must come before
// worker threads start, because it replaces the SIGILL action for a moment.
FeatureSet DetectFeatures();

// Returns this machine's answers to the steps.
const std::vector<TileStep>& DetectTileSteps();

// Makes DetectFeatures report `features`, too. Meant for tests that run a variant under an
// instruction emulator. Without an emulator, a variant that the CPU lacks ends the process with
// SIGILL.
void AssumeFeatures(const FeatureSet& features);

std::vector<std::string> MissingFeatures(const IsaRow& isa, const FeatureSet& cpu);

// The names of the built ISAs that `cpu` can run, in the order of KnownIsas.
std::vector<std::string> SupportedIsas(const FeatureSet& cpu,
                                       const std::vector<IsaRow>& isas = KnownIsas());

// Returns SupportedIsas, of which the last one is the best. If there is none, throws
// std::invalid_argument, which says what each built ISA lacks.
std::vector<std::string> UsableIsas(const FeatureSet& cpu,
                                    const std::vector<IsaRow>& isas = KnownIsas());

// Returns the row called `name`, if it is built and `cpu` can run it. Otherwise throws
// std::invalid_argument, which says what is missing and what would work. `origin` names the source
// of the request, e.g. "CPUMOE_ISA".
const IsaRow& RequireIsa(const std::string& name, const FeatureSet& cpu, const std::string& origin);

struct IsaChoice {
  std::string name;
  std::string origin;  // what named it, for errors
};

// Returns the ISA to use: `requested`, or else the one that the environment's CPUMOE_ISA names, or
// else the best. `argument` is the name of the caller's argument. Throws what RequireIsa and
// UsableIsas throw.
IsaChoice SelectIsa(const std::optional<std::string>& requested, const std::string& argument,
                    const FeatureSet& cpu);

}  // namespace cpumoe
