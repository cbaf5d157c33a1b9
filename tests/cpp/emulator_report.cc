// Every test program that emulated instructions prints their counts at its end.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "emulator/emulator.h"

namespace cpumoe::emulator {
namespace {

class Report : public testing::Environment {
 public:
  void TearDown() override {
    std::string counts;
    for (int i = 0; i < kNumInstructions; ++i) {
      const uint64_t count = TotalCount(static_cast<Instruction>(i));
      if (count == 0) continue;
      counts += (counts.empty() ? "" : ", ") + std::string(kInstructions[i].name) + " " +
                std::to_string(count);
    }
    if (!counts.empty()) std::printf("emulated: %s\n", counts.c_str());
  }
};

[[maybe_unused]] const auto* const report = testing::AddGlobalTestEnvironment(new Report);

}  // namespace
}  // namespace cpumoe::emulator
