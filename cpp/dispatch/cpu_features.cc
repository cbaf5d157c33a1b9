#include "dispatch/cpu_features.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "base/check.h"

namespace cpumoe {
namespace {

std::mutex assumed_mutex;
FeatureSet assumed_features;

// The bits of XCR0 for the registers that a feature's instructions use (SDM volume 1, section
// 13.1).
uint64_t StateOf(const std::string& feature) {
  constexpr uint64_t kXmm = 1 << 1, kYmm = 1 << 2, kMasksAndZmm = 7 << 5;
  if (NeedsTiles(feature)) return kTileState;
  return kXmm | kYmm | (feature.starts_with("avx512") ? kMasksAndZmm : 0);
}

struct Detected {
  std::vector<TileStep> tile_steps;
  FeatureSet features;
};

const Detected& Detect() {
  static const Detected detected = [] {
    const MachineAnswers machine = AskMachine();
    const std::vector<TileStep> steps = TakeTileSteps(machine);
    return Detected{steps, UsableFeatures(machine, steps)};
  }();
  return detected;
}

std::string Join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// Says why a CPU that has tile registers cannot use them. Empty if features are missing for another
// reason.
std::string WhyNoTiles(const std::vector<std::string>& missing) {
  const std::vector<TileStep>& steps = DetectTileSteps();
  const bool wanted = std::any_of(missing.begin(), missing.end(), NeedsTiles);
  if (!wanted || !steps.front().passed.value_or(false)) return "";
  for (const TileStep& step : steps) {
    if (step.passed.value_or(false)) continue;
    return " (CPUID advertises AMX, but this condition does not hold: " + step.question +
           (step.found.empty() ? ")" : ": " + step.found + ")");
  }
  return "";
}

}  // namespace

const std::vector<IsaRow>& KnownIsas() {
#define CPUMOE_ISA_ROW(name, built, ...) IsaRow{name, built, {__VA_ARGS__}},
  static const std::vector<IsaRow> isas = {
#include "isa_table.inc"
  };
#undef CPUMOE_ISA_ROW
  return isas;
}

FeatureSet UsableFeatures(const MachineAnswers& machine, const std::vector<TileStep>& steps) {
  FeatureSet usable;
  const uint64_t saved = machine.xcr0.value_or(0);
  for (const std::string& feature : machine.advertised) {
    const uint64_t state = StateOf(feature);
    if ((saved & state) != state || (NeedsTiles(feature) && !TileStateUsable(steps))) continue;
    usable.insert(feature);
  }
  return usable;
}

FeatureSet DetectFeatures() {
  FeatureSet found = Detect().features;
  const std::lock_guard lock(assumed_mutex);
  found.insert(assumed_features.begin(), assumed_features.end());
  return found;
}

const std::vector<TileStep>& DetectTileSteps() { return Detect().tile_steps; }

void AssumeFeatures(const FeatureSet& features) {
  const std::lock_guard lock(assumed_mutex);
  assumed_features.insert(features.begin(), features.end());
}

std::vector<std::string> MissingFeatures(const IsaRow& isa, const FeatureSet& cpu) {
  std::vector<std::string> missing;
  for (const std::string& feature : isa.features) {
    if (!cpu.contains(feature)) missing.push_back(feature);
  }
  return missing;
}

std::vector<std::string> SupportedIsas(const FeatureSet& cpu, const std::vector<IsaRow>& isas) {
  std::vector<std::string> names;
  for (const IsaRow& isa : isas) {
    if (isa.built && MissingFeatures(isa, cpu).empty()) names.push_back(isa.name);
  }
  return names;
}

std::vector<std::string> UsableIsas(const FeatureSet& cpu, const std::vector<IsaRow>& isas) {
  std::vector<std::string> supported = SupportedIsas(cpu, isas);
  if (!supported.empty()) return supported;
  std::string lacks;
  for (const IsaRow& isa : isas) {
    if (!isa.built) continue;
    lacks += (lacks.empty() ? "" : "; ") + isa.name + ": lacks " + Join(MissingFeatures(isa, cpu));
  }
  throw std::invalid_argument("this CPU can run none of the installed variants (" + lacks +
                              "); reinstall cpumoe with CPUMOE_ISAS empty, which builds all "
                              "variants");
}

const IsaRow& RequireIsa(const std::string& name, const FeatureSet& cpu,
                         const std::string& origin) {
  const std::string works = Join(SupportedIsas(cpu));
  for (const IsaRow& isa : KnownIsas()) {
    if (isa.name != name) continue;
    Require(isa.built, origin, "=", name, ": this installation was built without it; it has ",
            works);
    const std::vector<std::string> missing = MissingFeatures(isa, cpu);
    Require(missing.empty(), origin, "=", name, ": this CPU lacks ", Join(missing),
            WhyNoTiles(missing), "; it supports ", works);
    return isa;
  }
  std::vector<std::string> known;
  for (const IsaRow& isa : KnownIsas()) known.push_back(isa.name);
  throw std::invalid_argument(Message(origin, "=", name, ": unknown ISA; known are ", Join(known),
                                      "; this CPU supports ", works));
}

IsaChoice SelectIsa(const std::optional<std::string>& requested, const std::string& argument,
                    const FeatureSet& cpu) {
  constexpr char kVariable[] = "CPUMOE_ISA";
  const char* const forced = std::getenv(kVariable);
  const bool is_forced = forced != nullptr && *forced != '\0';
  if (!requested && !is_forced) return {UsableIsas(cpu).back(), argument};
  const IsaChoice choice =
      requested ? IsaChoice{*requested, argument} : IsaChoice{forced, kVariable};
  RequireIsa(choice.name, cpu, choice.origin);
  return choice;
}

}  // namespace cpumoe
