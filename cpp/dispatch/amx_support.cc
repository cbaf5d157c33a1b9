#include "dispatch/amx_support.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <system_error>

#include "base/check.h"

namespace cpumoe {
namespace {

// The palette that the kernels are written for. A larger one serves as well.
constexpr TilePalette kNeeded = {
    .tiles = 8, .rows = 16, .row_bytes = 64, .product_depth = 16, .product_row_bytes = 64};

bool IsLargeEnough(const TilePalette& p) {
  return p.tiles >= kNeeded.tiles && p.rows >= kNeeded.rows && p.row_bytes >= kNeeded.row_bytes &&
         p.product_depth >= kNeeded.product_depth &&
         p.product_row_bytes >= kNeeded.product_row_bytes;
}

std::string Describe(const TilePalette& p) {
  if (p.tiles == 0) return "none";
  return Message(p.tiles, " tiles ", p.rows, "x", p.row_bytes, ", products ", p.product_depth, "x",
                 p.product_row_bytes);
}

std::string Hexadecimal(uint64_t bits) {
  char digits[16];
  return "0x" + std::string(digits, std::to_chars(digits, std::end(digits), bits, 16).ptr);
}

}  // namespace

bool NeedsTiles(const std::string& feature) { return feature.starts_with("amx-"); }

std::vector<TileStep> TakeTileSteps(const MachineAnswers& machine) {
  const uint64_t xcr0 = machine.xcr0.value_or(0);
  std::vector<TileStep> steps = {
      {"cpuid", "CPUID advertises it", machine.advertised.contains("amx-tile"), ""},
      {"osxsave", "OSXSAVE is set", machine.xcr0.has_value(), ""},
      {"xcr0", "XCR0 has bits 17 and 18", (xcr0 & kTileState) == kTileState,
       machine.xcr0 ? "XCR0 is " + Hexadecimal(xcr0) : ""},
      {"palette", "palette 1 is large enough", IsLargeEnough(machine.palette),
       Describe(machine.palette)},
      {"permission", "the kernel permits it", {}, ""},
      {"trial", "a trial instruction executes", {}, ""}};
  TileStep& permission = steps[4];
  TileStep& trial = steps[5];
  if (!std::all_of(steps.begin(), steps.begin() + 4, [](const auto& s) { return *s.passed; })) {
    return steps;
  }
  const int error = machine.permit_tiles();
  permission.passed = error == 0;
  if (error != 0) {
    permission.found = std::generic_category().message(error);
    return steps;
  }
  trial.passed = machine.execute_tile();
  if (!*trial.passed) trial.found = "it raises SIGILL";
  return steps;
}

bool TileStateUsable(const std::vector<TileStep>& steps) {
  return std::all_of(steps.begin(), steps.end(),
                     [](const TileStep& step) { return step.passed.value_or(false); });
}

}  // namespace cpumoe
