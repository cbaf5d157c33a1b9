// The emulator as a library for LD_PRELOAD, so that Python tests run the variants that this CPU
// lacks:
//
//   CPUMOE_TEST_EMULATOR=1 LD_PRELOAD=<build>/lib/cpumoe_emulator.so python -m pytest
//
// Python's faulthandler, which pytest enables, takes SIGILL for itself: sigaction() is intercepted
// so that it comes second. Never part of the wheel.
#include <dlfcn.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>

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

// For ctypes: emulator::Count of the instruction with this number.
[[gnu::visibility("default")]] uint64_t cpumoe_emulator_count(int instruction) {
  return cpumoe::emulator::Count(static_cast<cpumoe::emulator::Instruction>(instruction));
}

}  // extern "C"
