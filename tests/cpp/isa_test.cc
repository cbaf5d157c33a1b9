#include "cpp/isa_test.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <ostream>
#include <stdexcept>

#include "base/check.h"
#include "cpp/all_formats.h"
#include "dispatch/cpu_features.h"
#include "dispatch/variant_loader.h"
#include "emulator/emulator.h"

namespace cpumoe {
namespace {

// The features of this CPU itself. Must be called before any feature is assumed.
const FeatureSet& NativeFeatures() {
  static const FeatureSet features = DetectFeatures();
  return features;
}

const IsaRow& Row(const std::string& name) {
  for (const IsaRow& row : KnownIsas()) {
    if (row.name == name) return row;
  }
  throw std::invalid_argument("no ISA is called " + name);
}

// Returns the second table of the library that a variant came from.
const kernel_probe::Api* ProbeOf(const VariantApi& variant) {
  Dl_info info;
  if (dladdr(&variant, &info) == 0) throw std::runtime_error("cannot find a variant's library");
  void* library = dlopen(info.dli_fname, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  void* function = dlsym(library, kernel_probe::kApiSymbol);
  if (function == nullptr) throw std::runtime_error(dlerror());
  return reinterpret_cast<kernel_probe::ApiFunction>(function)();
}

const char* PathName(const IsaFormat& param) {
  if (param.precision == Precision::kInt8) return "int8";
  return param.fp32_as_bf16 ? "bf16" : "fp32";
}

}  // namespace

void PrintTo(const IsaFormat& param, std::ostream* out) {
  *out << param.isa << " " << param.format << " " << PathName(param);
}

std::vector<std::string> IsaNames() {
  const char* chosen = std::getenv("CPUMOE_TEST_ISAS");
  const std::string list = chosen == nullptr ? "" : "," + std::string(chosen) + ",";
  std::vector<std::string> names;
  for (const IsaRow& row : KnownIsas()) {
    const bool is_chosen = list.find("," + row.name + ",") != std::string::npos;
    if (list.empty() || is_chosen) names.push_back(row.name);
  }
  return names;
}

std::vector<IsaFormat> IsaFormats() {
  std::vector<IsaFormat> all;
  for (const std::string& isa : IsaNames()) {
    for (const std::string& format : FormatNames()) all.push_back({isa, format});
  }
  return all;
}

std::vector<IsaFormat> IsaFormatsAndPaths() {
  std::vector<IsaFormat> all;
  for (IsaFormat param : IsaFormats()) {
    all.push_back(param);
    const std::vector<std::string>& features = Row(param.isa).features;
    if (std::ranges::find(features, "avx512bf16") != features.end()) {
      param.fp32_as_bf16 = false;
      all.push_back(param);
      param.fp32_as_bf16 = true;
    }
    param.precision = Precision::kInt8;
    all.push_back(param);
  }
  return all;
}

std::string NameOfIsa(const testing::TestParamInfo<std::string>& info) { return info.param; }

std::string NameOfIsaFormat(const testing::TestParamInfo<IsaFormat>& info) {
  const std::string path = PathName(info.param);
  return info.param.isa + "_" + info.param.format + (path == "bf16" ? "" : "_" + path);
}

std::string ObstacleTo(const std::string& isa) {
  const IsaRow& row = Row(isa);
  if (!row.built) return isa + " was not built";
  std::string lacking;
  for (const std::string& feature : MissingFeatures(row, NativeFeatures())) {
    const bool emulated = emulator::Supports(feature);
    if (!emulated) lacking += (lacking.empty() ? "" : ", ") + feature;
  }
  return lacking.empty() ? "" : isa + ": this CPU lacks " + lacking;
}

std::string IsaRun::Begin(const std::string& isa) {
  const std::string obstacle = ObstacleTo(isa);
  if (!obstacle.empty()) return obstacle;
  const IsaRow& row = Row(isa);
  const std::vector<std::string> missing = MissingFeatures(row, NativeFeatures());
  if (!missing.empty()) {
    emulator::Install();
    AssumeFeatures({missing.begin(), missing.end()});
  }
  features_ = {row.features.begin(), row.features.end()};
  emulated_ = {missing.begin(), missing.end()};
  emulator::ResetCounts();
  variant_ = &LoadVariant(isa, "test");
  probe_ = ProbeOf(*variant_);
  return "";
}

// Counts cover emulated instructions only.
void IsaRun::End() const {
  uint64_t best = 0;
  const char* best_name = nullptr;
  bool best_is_counted = false;
  for (int i = 0; i < emulator::kNumInstructions; ++i) {
    const auto instruction = static_cast<emulator::Instruction>(i);
    const emulator::InstructionInfo& info = emulator::Info(instruction);
    const uint64_t count = emulator::Count(instruction);
    const bool is_counted = emulated_.contains(info.feature);
    if (!is_counted) {
      EXPECT_EQ(count, 0u) << info.name << ": the variant uses instructions beyond its ISA";
    }
    if (!info.is_evidence || !features_.contains(info.feature)) continue;
    best = count;
    best_name = info.name;
    best_is_counted = is_counted;
  }
  if (best_is_counted && expects_best_dots_) {
    EXPECT_GT(best, 0u) << "many tokens were multiplied without " << best_name;
  }
}

void IsaFormatTest::SetUp() {
  Begin(GetParam().isa);
  if (precision() == Precision::kInt8)
    RequireKernels(&kernel_probe::FormatEntry::int8, "int8 path");
}

void IsaFormatTest::RequireKernels(bool kernel_probe::FormatEntry::* kind, const char* name) const {
  if (IsSkipped() || HasFatalFailure() || kernels().*kind) return;
  GTEST_SKIP() << "this ISA has no " << name << " for " << format();
}

const FormatEntry& IsaFormatTest::entry() const {
  const VariantApi& variant = run_.variant();
  for (size_t i = 0; i < variant.num_formats; ++i) {
    if (variant.formats[i].row == format()) return variant.formats[i];
  }
  throw std::invalid_argument("the variant lacks format " + format());
}

const kernel_probe::FormatEntry& IsaFormatTest::kernels() const {
  const kernel_probe::Api& probe = run_.probe();
  for (size_t i = 0; i < probe.num_formats; ++i) {
    if (probe.formats[i].format == format()) return probe.formats[i];
  }
  throw std::invalid_argument("the probe lacks format " + format());
}

}  // namespace cpumoe
