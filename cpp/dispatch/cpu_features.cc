#include "dispatch/cpu_features.h"

#include <mutex>
#include <stdexcept>

#include "base/check.h"

namespace cpumoe {
namespace {

std::mutex assumed_mutex;
FeatureSet assumed_features;

std::string Join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
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

FeatureSet DetectFeatures() {
  FeatureSet found;
  // The builtin wants a literal, hence a test generated per feature. It knows what the operating
  // system saves (XCR0), not only what CPUID advertises.
#if defined(__x86_64__)
  __builtin_cpu_init();
#define CPUMOE_FEATURE_ROW(feature) \
  if (__builtin_cpu_supports(feature)) found.insert(feature);
#include "feature_table.inc"
#undef CPUMOE_FEATURE_ROW
#endif
  const std::lock_guard lock(assumed_mutex);
  found.insert(assumed_features.begin(), assumed_features.end());
  return found;
}

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

std::vector<std::string> SupportedIsas(const FeatureSet& cpu) {
  std::vector<std::string> names;
  for (const IsaRow& isa : KnownIsas()) {
    if (isa.built && MissingFeatures(isa, cpu).empty()) names.push_back(isa.name);
  }
  return names;
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
            "; it supports ", works);
    return isa;
  }
  std::vector<std::string> known;
  for (const IsaRow& isa : KnownIsas()) known.push_back(isa.name);
  throw std::invalid_argument(Message(origin, "=", name, ": unknown ISA; known are ", Join(known),
                                      "; this CPU supports ", works));
}

}  // namespace cpumoe
