// What detection concludes from the answers of CPU and operating system, for machines that we do
// not have.
#include <gtest/gtest.h>

#include <cerrno>
#include <csignal>
#include <optional>
#include <string>
#include <vector>

#include "dispatch/amx_support.h"
#include "dispatch/cpu_features.h"
#include "dispatch/machine.h"

namespace cpumoe {
namespace {

constexpr uint64_t kSse = 0x3, kAvx = 0x7, kAvx512 = 0xE7, kAmx = 0x602E7;
constexpr TilePalette kPalette1 = {
    .tiles = 8, .rows = 16, .row_bytes = 64, .product_depth = 16, .product_row_bytes = 64};

const FeatureSet kHaswell = {"avx2", "fma", "f16c"};

FeatureSet With(FeatureSet base, const FeatureSet& more) {
  base.insert(more.begin(), more.end());
  return base;
}
const FeatureSet kSkylakeX = With(kHaswell, {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
const FeatureSet kAlderLake = With(kHaswell, {"avxvnni"});
const FeatureSet kIceLake = With(kSkylakeX, {"avx512vnni"});
const FeatureSet kZen4 = With(kIceLake, {"avx512bf16"});
const FeatureSet kSapphireRapids = With(kZen4, {"amx-tile", "amx-bf16", "amx-int8"});

struct Case {
  const char* name;
  FeatureSet advertised;
  std::optional<uint64_t> xcr0;
  TilePalette palette;
  int permission;  // errno
  bool executes;

  FeatureSet usable;
  std::vector<std::string> failed;  // tile steps
};

const std::vector<Case>& Cases() {
  static const std::vector<std::string> no_amx = {"cpuid", "xcr0", "palette"};
  static const std::vector<Case> cases = {
      {"SkylakeX", kSkylakeX, kAvx512, {}, EINVAL, false, kSkylakeX, no_amx},
      {"IceLake", kIceLake, kAvx512, {}, EINVAL, false, kIceLake, no_amx},
      {"CooperLake", kZen4, kAvx512, {}, EINVAL, false, kZen4, no_amx},
      {"Zen4", kZen4, 0x2E7, {}, EINVAL, false, kZen4, no_amx},
      {"AlderLake", kAlderLake, 0x207, {}, EINVAL, false, kAlderLake, no_amx},
      {"SapphireRapids", kSapphireRapids, kAmx, kPalette1, 0, true, kSapphireRapids, {}},
      {"NoOsxsave", kSapphireRapids, std::nullopt, kPalette1, 0, true, {}, {"osxsave", "xcr0"}},
      {"SystemSavesXmmOnly", kZen4, kSse, {}, EINVAL, false, {}, no_amx},
      {"HypervisorMasksAvx512", kZen4, kAvx, {}, EINVAL, false, kHaswell, no_amx},
      {"HypervisorMasksOpmasks", kZen4, 0xC7, {}, EINVAL, false, kHaswell, no_amx},
      {"Xcr0WithoutTiles", kSapphireRapids, kAvx512, kPalette1, 0, true, kZen4, {"xcr0"}},
      {"Xcr0WithoutTileData", kSapphireRapids, 0x202E7, kPalette1, 0, true, kZen4, {"xcr0"}},
      {"EmptyPalette", kSapphireRapids, kAmx, {}, 0, true, kZen4, {"palette"}},
      {"PaletteWithoutProducts",
       kSapphireRapids,
       kAmx,
       {.tiles = 8, .rows = 16, .row_bytes = 64, .product_depth = 0, .product_row_bytes = 0},
       0,
       true,
       kZen4,
       {"palette"}},
      {"OldKernel", kSapphireRapids, kAmx, kPalette1, EINVAL, true, kZen4, {"permission"}},
      {"SmallSignalStack", kSapphireRapids, kAmx, kPalette1, ENOSPC, true, kZen4, {"permission"}},
      {"TrialTraps", kSapphireRapids, kAmx, kPalette1, 0, false, kZen4, {"trial"}},
  };
  return cases;
}

class DetectionTest : public testing::TestWithParam<Case> {
 protected:
  MachineAnswers Machine() {
    return {.advertised = GetParam().advertised,
            .xcr0 = GetParam().xcr0,
            .palette = GetParam().palette,
            .permit_tiles =
                [this] {
                  asked_.push_back("permission");
                  return GetParam().permission;
                },
            .execute_tile =
                [this] {
                  asked_.push_back("trial");
                  return GetParam().executes;
                }};
  }

  std::vector<std::string> asked_;
};

INSTANTIATE_TEST_SUITE_P(, DetectionTest, testing::ValuesIn(Cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(DetectionTest, UsesWhatIsAdvertisedAndSaved) {
  const MachineAnswers machine = Machine();
  EXPECT_EQ(UsableFeatures(machine, TakeTileSteps(machine)), GetParam().usable);
}

TEST_P(DetectionTest, TileStepsFailWhereTheyShould) {
  std::vector<std::string> failed;
  for (const TileStep& step : TakeTileSteps(Machine())) {
    if (step.passed == false) failed.push_back(step.name);
  }
  EXPECT_EQ(failed, GetParam().failed);
}

// Detection asks for permission and tries an instruction only if all earlier steps have passed.
TEST_P(DetectionTest, EffectsOnlyWhereAllElseHolds) {
  const std::vector<TileStep> steps = TakeTileSteps(Machine());
  std::vector<std::string> expected;
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool effect = steps[i].name == "permission" || steps[i].name == "trial";
    const bool before = TileStateUsable({steps.begin(), steps.begin() + static_cast<long>(i)});
    EXPECT_EQ(steps[i].passed.has_value(), !effect || before) << steps[i].name;
    if (effect && before) expected.push_back(steps[i].name);
  }
  EXPECT_EQ(asked_, expected);
  EXPECT_EQ(TileStateUsable(steps), GetParam().failed.empty());
}

TEST(TileStepsTest, SayWhatWasFound) {
  const MachineAnswers machine = {.advertised = kSapphireRapids,
                                  .xcr0 = kAmx,
                                  .palette = kPalette1,
                                  .permit_tiles = [] { return EINVAL; },
                                  .execute_tile = {}};
  const std::vector<TileStep> steps = TakeTileSteps(machine);
  ASSERT_EQ(steps.size(), 6u);
  EXPECT_EQ(steps[2].found, "XCR0 is 0x602e7");
  EXPECT_EQ(steps[3].found, "8 tiles 16x64, products 16x64");
  EXPECT_EQ(steps[4].found, "Invalid argument");
  EXPECT_EQ(steps[5].passed, std::nullopt);
}

TEST(AskMachineTest, ThisMachineAgreesWithItself) {
  const MachineAnswers machine = AskMachine();
  const FeatureSet detected = DetectFeatures();  // includes what other tests made it assume
  for (const std::string& feature : UsableFeatures(machine, DetectTileSteps())) {
    EXPECT_TRUE(detected.contains(feature)) << feature;
  }
  // The compiler's builtin knows XCR0, too.
  for (const std::string& feature : machine.advertised) {
    EXPECT_TRUE(detected.contains(feature) || feature.starts_with("amx-")) << feature;
  }
}

// On any CPU, the trial does not kill the process, and puts the earlier action back.
TEST(AskMachineTest, TheTrialIsHarmless) {
  const MachineAnswers machine = AskMachine();
  if (!machine.execute_tile) GTEST_SKIP() << "no tile instructions on this architecture";
  struct sigaction before = {}, after = {};
  sigaction(SIGILL, nullptr, &before);
  const bool executes = machine.execute_tile();
  EXPECT_EQ(machine.execute_tile(), executes);
  sigaction(SIGILL, nullptr, &after);
  EXPECT_EQ(before.sa_handler, after.sa_handler);
  if (!machine.advertised.contains("amx-tile")) {
    EXPECT_FALSE(executes);
  }
}

}  // namespace
}  // namespace cpumoe
