// Which variants a CPU can run, for machines that we do not have, and the messages about a refused
// choice.
#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/message_of.h"
#include "dispatch/cpu_features.h"
#include "dispatch/variant_loader.h"
#include "variant/build_id.h"

namespace cpumoe {
namespace {

using Names = std::vector<std::string>;

struct Machine {
  const char* name;
  FeatureSet features;
  Names supported;  // assuming that all ISAs of x86-64 are built
};

const FeatureSet kHaswell = {"avx2", "fma", "f16c"};

FeatureSet With(FeatureSet base, const FeatureSet& more) {
  base.insert(more.begin(), more.end());
  return base;
}
FeatureSet Without(FeatureSet base, const std::string& feature) {
  base.erase(feature);
  return base;
}

const std::vector<Machine>& Machines() {
  static const FeatureSet skylake = With(kHaswell, {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
  static const FeatureSet ice_lake = With(skylake, {"avx512vnni"});
  static const FeatureSet zen4 = With(ice_lake, {"avx512bf16"});
  static const std::vector<Machine> machines = {
      {"Nothing", {}, {"generic"}},
      {"SandyBridge", {"avx"}, {"generic"}},
      {"Haswell", kHaswell, {"generic", "avx2"}},
      {"HaswellWithoutFma", Without(kHaswell, "fma"), {"generic"}},
      {"KnightsLanding", With(kHaswell, {"avx512f"}), {"generic", "avx2"}},
      {"AlderLake", With(kHaswell, {"avxvnni"}), {"generic", "avx2", "avx2_vnni"}},
      {"AvxVnniWithoutFma", With(Without(kHaswell, "fma"), {"avxvnni"}), {"generic"}},
      {"SkylakeX", skylake, {"generic", "avx2", "avx512"}},
      {"IceLake", ice_lake, {"generic", "avx2", "avx512", "avx512_vnni"}},
      {"CooperLake", zen4, {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"}},
      {"Zen4", zen4, {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"}},
      {"SapphireRapids",
       With(zen4, {"avxvnni", "amx-tile", "amx-bf16", "amx-int8"}),
       {"generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"}},
      {"Zen5",
       With(zen4, {"avxvnni"}),
       {"generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"}},
      {"AmxWithoutInt8",
       With(zen4, {"amx-tile", "amx-bf16"}),
       {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"}},
      {"Avx512WithoutAvx2", Without(zen4, "avx2"), {"generic"}},
      {"Bf16WithoutVnni", Without(zen4, "avx512vnni"), {"generic", "avx2", "avx512"}},
  };
  return machines;
}

bool IsBuilt(const std::string& name) {
  for (const IsaRow& row : KnownIsas()) {
    if (row.name == name) return row.built;
  }
  return false;
}
bool AllAreBuilt() {
  for (const IsaRow& row : KnownIsas()) {
    if (!row.built) return false;
  }
  return true;
}

std::string MessageOf(const std::string& isa, const FeatureSet& cpu) {
  try {
    return RequireIsa(isa, cpu, "CPUMOE_ISA").name + " is accepted";
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

class MachineTest : public testing::TestWithParam<Machine> {};

TEST_P(MachineTest, SupportsTheIsasWhoseFeaturesItHas) {
  Names expected;
  for (const std::string& isa : GetParam().supported) {
    if (IsBuilt(isa)) expected.push_back(isa);
  }
  EXPECT_EQ(SupportedIsas(GetParam().features), expected);
}

TEST_P(MachineTest, RequireIsaAgreesWithSupportedIsas) {
  const Names supported = SupportedIsas(GetParam().features);
  const std::set<std::string> set(supported.begin(), supported.end());
  for (const IsaRow& row : KnownIsas()) {
    const bool accepted = MessageOf(row.name, GetParam().features) == row.name + " is accepted";
    EXPECT_EQ(accepted, set.contains(row.name)) << row.name;
  }
}

INSTANTIATE_TEST_SUITE_P(, MachineTest, testing::ValuesIn(Machines()),
                         [](const auto& info) { return info.param.name; });

TEST(RequireIsaTest, NamesTheMissingFeatures) {
  if (!AllAreBuilt()) GTEST_SKIP() << "not all ISAs were built";
  const FeatureSet skylake = With(kHaswell, {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
  EXPECT_EQ(MessageOf("avx512_bf16", With(skylake, {"avx512vnni"})),
            "CPUMOE_ISA=avx512_bf16: this CPU lacks avx512bf16; it supports generic, avx2, avx512, "
            "avx512_vnni");
  EXPECT_EQ(MessageOf("avx512_bf16", skylake),
            "CPUMOE_ISA=avx512_bf16: this CPU lacks avx512vnni, avx512bf16; it supports generic, "
            "avx2, avx512");
  EXPECT_EQ(MessageOf("amx", With(skylake, {"avx512vnni", "avx512bf16"})),
            "CPUMOE_ISA=amx: this CPU lacks amx-tile, amx-bf16, amx-int8; it supports generic, "
            "avx2, avx512, avx512_vnni, avx512_bf16");
  EXPECT_EQ(MessageOf("avx2", {"fma"}),
            "CPUMOE_ISA=avx2: this CPU lacks avx2, f16c; it supports generic");
}

TEST(RequireIsaTest, NamesTheKnownIsas) {
  if (!AllAreBuilt()) GTEST_SKIP() << "not all ISAs were built";
  std::string known;
  for (const IsaRow& row : KnownIsas()) known += (known.empty() ? "" : ", ") + row.name;
  EXPECT_EQ(MessageOf("sse9", kHaswell), "CPUMOE_ISA=sse9: unknown ISA; known are " + known +
                                             "; this CPU supports generic, avx2");
  EXPECT_EQ(MessageOf("", {}),
            "CPUMOE_ISA=: unknown ISA; known are " + known + "; this CPU supports generic");
}

TEST(RequireIsaTest, SaysWhatWasNotBuilt) {
  FeatureSet all;
  for (const IsaRow& row : KnownIsas()) all.insert(row.features.begin(), row.features.end());
  for (const IsaRow& row : KnownIsas()) {
    if (row.built) continue;
    const std::string message = MessageOf(row.name, all);
    EXPECT_NE(message.find("this installation was built without it; it has "), std::string::npos)
        << message;
  }
}

// Sets CPUMOE_ISA for a test, and restores it.
class SelectIsaTest : public testing::Test {
 protected:
  SelectIsaTest() {
    if (const char* const value = std::getenv("CPUMOE_ISA"); value != nullptr) before_ = value;
  }
  ~SelectIsaTest() override { Set(before_); }

  static void Set(const std::optional<std::string>& value) {
    if (value) {
      setenv("CPUMOE_ISA", value->c_str(), 1);
    } else {
      unsetenv("CPUMOE_ISA");
    }
  }
  // Returns "NAME from ORIGIN", or the message of the error.
  static std::string Select(const std::optional<std::string>& requested, const FeatureSet& cpu) {
    try {
      const IsaChoice choice = SelectIsa(requested, "isa", cpu);
      return choice.name + " from " + choice.origin;
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  }

 private:
  std::optional<std::string> before_;
};

TEST_F(SelectIsaTest, AnArgumentGoesBeforeTheEnvironmentAndThisBeforeTheBest) {
  const FeatureSet cpu = DetectFeatures();
  const Names usable = UsableIsas(cpu);
  for (const std::optional<std::string>& unset :
       {std::optional<std::string>(), std::optional<std::string>("")}) {
    Set(unset);
    EXPECT_EQ(Select({}, cpu), usable.back() + " from isa");
    EXPECT_EQ(Select(usable.front(), cpu), usable.front() + " from isa");
  }
  Set(usable.front());
  EXPECT_EQ(Select({}, cpu), usable.front() + " from CPUMOE_ISA");
  EXPECT_EQ(Select(usable.back(), cpu), usable.back() + " from isa");
}

TEST_F(SelectIsaTest, AnErrorNamesWhereTheVariantWasAskedFor) {
  const FeatureSet cpu = DetectFeatures();
  Set("sse9");
  EXPECT_TRUE(Select({}, cpu).starts_with("CPUMOE_ISA=sse9: unknown ISA; known are "));
  EXPECT_TRUE(Select("sse8", cpu).starts_with("isa=sse8: unknown ISA; known are "));
  EXPECT_TRUE(Select("", cpu).starts_with("isa=: unknown ISA; known are "));
}

TEST(UsableIsasTest, SaysWhatEachBuiltVariantLacks) {
  const std::vector<IsaRow> isas = {
      {"generic", false, {}}, {"avx2", true, {"avx2", "fma"}}, {"avx512", true, {"avx512f"}}};
  EXPECT_EQ(UsableIsas({"avx512f"}, isas), Names{"avx512"});
  try {
    UsableIsas({"fma"}, isas);
    ADD_FAILURE() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "this CPU can run none of the installed variants (avx2: lacks avx2; avx512: lacks "
                 "avx512f); reinstall cpumoe with CPUMOE_ISAS empty, which builds all variants");
  }
}

TEST(IsaTableTest, RowsAreDistinctAndGenericComesFirst) {
  ASSERT_FALSE(KnownIsas().empty());
  EXPECT_EQ(KnownIsas().front().name, "generic");
  EXPECT_TRUE(KnownIsas().front().features.empty());
  std::set<std::string> names;
  for (const IsaRow& row : KnownIsas()) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name << " is there twice";
    const std::set<std::string> features(row.features.begin(), row.features.end());
    EXPECT_EQ(features.size(), row.features.size()) << row.name;
  }
}

TEST(DetectFeaturesTest, AssumedFeaturesAreReported) {
  const FeatureSet detected = DetectFeatures();
  AssumeFeatures({"made-up"});
  EXPECT_EQ(DetectFeatures(), With(detected, {"made-up"}));
}

TEST(LoadVariantTest, LoadsEverySupportedIsaOnce) {
  for (const std::string& isa : SupportedIsas(DetectFeatures())) {
    const VariantApi& variant = LoadVariant(isa, "test");
    EXPECT_EQ(variant.isa, isa);
    EXPECT_EQ(&LoadVariant(isa, "test"), &variant);
    Names rows;
    for (size_t i = 0; i < variant.num_formats; ++i) rows.push_back(variant.formats[i].row);
    EXPECT_EQ(rows, FormatNames());
  }
}

TEST(LoadVariantTest, RefusesAnUnknownIsa) {
  EXPECT_THROW(LoadVariant("sse9", "test"), std::invalid_argument);
}

// Returns the message with which the loader refuses a library of tests/cpp/refused_variant.cc.
std::string RefusalOf(const std::string& path) {
  try {
    OpenVariant("generic", path);
    return "accepted";
  } catch (const VariantError& error) {
    return error.what();
  }
}
std::string RefusedLibrary(const std::string& kind) {
  return std::string(CPUMOE_TEST_LIBRARY_FOLDER) + "/refused_" + kind + ".so";
}

TEST(OpenVariantTest, RefusesAnotherBuildWithoutCallingIt) {
  const std::string path = RefusedLibrary("other_build");
  EXPECT_EQ(RefusalOf(path), path + " has build id 0.0.9+0123456789abcdef, expected " + kBuildId +
                                 ": it is from another build of cpumoe; reinstall cpumoe");
}

TEST(OpenVariantTest, RefusesALibraryWithoutBuildIdWithoutCallingIt) {
  const std::string path = RefusedLibrary("no_build_id");
  EXPECT_EQ(RefusalOf(path), path + " has no build id, expected " + kBuildId +
                                 ": it is from another build of cpumoe; reinstall cpumoe");
}

TEST(OpenVariantTest, RefusesAnotherIsa) {
  const std::string path = RefusedLibrary("other_isa");
  EXPECT_EQ(RefusalOf(path),
            path + " is not cpumoe's library for variant generic; reinstall cpumoe");
}

TEST(OpenVariantTest, NamesAMissingFile) {
  const std::string path = RefusedLibrary("missing");
  const std::string message = RefusalOf(path);
  EXPECT_TRUE(message.starts_with("cannot open variant generic: " + path)) << message;
  EXPECT_TRUE(message.ends_with("; reinstall cpumoe")) << message;
}

TEST(BuildIdTest, IsTheVersionAndAHash) {
  const std::string id = kBuildId;
  EXPECT_TRUE(id.starts_with(std::string(kVersion) + "+")) << id;
  EXPECT_EQ(id.size(), std::string(kVersion).size() + 17) << id;
  EXPECT_EQ(id, std::string(cpumoe_build_id)) << "what variants export";
}

// FindFormat on a variant that was built and runs here, if there is one.
class FindFormatTest : public testing::Test {
 protected:
  void SetUp() override {
    const Names isas = SupportedIsas(DetectFeatures());
    if (isas.empty()) GTEST_SKIP() << "no variant that was built runs here";
    variant_ = &LoadVariant(isas.front(), "test");
  }

  const VariantApi* variant_ = nullptr;
};

TEST_F(FindFormatTest, FormatsDescribeThemselves) {
  for (size_t i = 0; i < variant_->num_formats; ++i) {
    const FormatInfo& info = variant_->formats[i].info;
    VisitFormat(variant_->formats[i].row, [&]<class F>(F) {
      EXPECT_EQ(info.name, F::kName);
      EXPECT_EQ(info.code_bits, F::kCodeBits);
      if constexpr (HasScales<F>) {
        EXPECT_EQ(info.scale_depth, F::kScaleDepth);
      } else {
        EXPECT_EQ(info.scale_depth, 0);
      }
      EXPECT_EQ(info.scale_bytes, kBytesOfScale<typename F::Scale>);
    });
  }
}

TEST_F(FindFormatTest, TheTypeOfScalesChoosesTheRow) {
  const auto row = [&](const std::string& format, ScaleType scales) {
    return std::string(FindFormat(*variant_, format, scales).row);
  };
  EXPECT_EQ(row("int4", ScaleType::kOwn), "int4");
  EXPECT_EQ(row("int4", ScaleType::kBf16), "int4");
  EXPECT_EQ(row("int4", ScaleType::kFp16), "int4_wide_scales");
  EXPECT_EQ(row("int4", ScaleType::kFp32), "int4_wide_scales");
  EXPECT_EQ(row("bf16", ScaleType::kOwn), "bf16");
  EXPECT_EQ(row("fp8", ScaleType::kE8M0), "fp8");
  EXPECT_EQ(cpumoe::MessageOf<std::invalid_argument>([&] { row("int4", ScaleType::kE8M0); }),
            "int4 has no E8M0 scales");
  EXPECT_EQ(cpumoe::MessageOf<std::invalid_argument>([&] { row("bf16", ScaleType::kBf16); }),
            "bf16 has no bf16 scales");
}

TEST_F(FindFormatTest, NamesTheKnownFormats) {
  std::string known;
  for (const FormatInfo& info : FormatsOf(*variant_)) {
    const std::string name = info.name;
    EXPECT_EQ(known.find(name + ","), std::string::npos) << name << " is listed twice";
    known += name + ", ";
  }
  for (const std::string row : {"fp3", "int4_wide_scales"}) {
    EXPECT_EQ(cpumoe::MessageOf<std::invalid_argument>([&] { FindFormat(*variant_, row); }) + ", ",
              "unknown weight format \"" + row + "\"; known are " + known);
  }
}

}  // namespace
}  // namespace cpumoe
