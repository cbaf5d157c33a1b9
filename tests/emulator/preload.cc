// The emulator as a library for LD_PRELOAD, so that Python tests can run the variants that this CPU
// lacks:
//
//   CPUMOE_TEST_EMULATOR=1 LD_PRELOAD=<build>/lib/cpumoe_emulator.so python -m pytest
//
// Python's faulthandler, which pytest enables, installs its own SIGILL action. Therefore
// sigaction() is intercepted, and faulthandler's action comes second. The wheel never includes this
// library.
#include <dlfcn.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulator.h"

namespace {

[[gnu::constructor]] void InstallIfAsked() {
  const char* value = std::getenv("CPUMOE_TEST_EMULATOR");
  if (value != nullptr && std::strcmp(value, "1") == 0) cpumoe::emulator::Install();
}

}  // namespace

extern "C" {

[[gnu::visibility("default")]] int sigaction(int signal, const struct sigaction* action,
                                             struct sigaction* old_action) noexcept {
  if (signal == SIGILL && cpumoe::emulator::ReplaceChainedAction(action, old_action)) return 0;
  using Function = int (*)(int, const struct sigaction*, struct sigaction*);
  const Function next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "sigaction"));
  return next(signal, action, old_action);
}

// Called through ctypes. Returns the counts of emulated instructions so far, as JSON that is valid
// until the next call.
[[gnu::visibility("default")]] const char* cpumoe_emulator_report() {
  static std::string report;
  report.clear();
  for (int i = 0; i < cpumoe::emulator::kNumInstructions; ++i) {
    const auto instruction = static_cast<cpumoe::emulator::Instruction>(i);
    const cpumoe::emulator::InstructionInfo& info = Info(instruction);
    report += std::string(i == 0 ? "[" : ", ") + "{\"name\": \"" + info.name +
              "\", \"feature\": \"" + info.feature +
              "\", \"is_evidence\": " + (info.is_evidence ? "true" : "false") +
              ", \"count\": " + std::to_string(TotalCount(instruction)) + "}";
  }
  report += ']';
  return report.c_str();
}

}  // extern "C"
