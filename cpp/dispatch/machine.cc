#include "dispatch/machine.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <mutex>

namespace cpumoe {
namespace {

struct Registers {
  unsigned a, b, c, d;
};

// Returns zeros for a leaf that the CPU does not have.
Registers Cpuid(unsigned leaf, unsigned subleaf) {
  Registers r = {};
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

std::optional<uint64_t> ReadXcr0() {
  constexpr unsigned kOsxsave = 1u << 27;
  if ((Cpuid(1, 0).c & kOsxsave) == 0) return std::nullopt;
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

TilePalette ReadPalette() {
  if (Cpuid(0x1D, 0).a < 1) return {};
  const Registers palette = Cpuid(0x1D, 1), product = Cpuid(0x1E, 0);
  return {.tiles = static_cast<int>(palette.b >> 16),
          .rows = static_cast<int>(palette.c & 0xFFFF),
          .row_bytes = static_cast<int>(palette.b & 0xFFFF),
          .product_depth = static_cast<int>(product.b & 0xFF),
          .product_row_bytes = static_cast<int>(product.b >> 8 & 0xFFFF)};
}

// Linux (5.16 and later) saves tile data only for a process that has asked for permission. The
// permission holds for all threads of the process, and for its children until exec.
int PermitTiles() {
  constexpr int kRequestPermission = 0x1023,
                kTileData = 18;  // <asm/prctl.h> may be too old to name them
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
}

pthread_t trial_thread;
sigjmp_buf trial_failed;
struct sigaction action_before_trial;

void HandleTrialSigill(int signal, siginfo_t* info, void* context) {
  if (pthread_equal(pthread_self(), trial_thread) != 0) siglongjmp(trial_failed, 1);
  // Another thread's instruction has trapped, which is handled as it would be without the trial.
  const struct sigaction& before = action_before_trial;
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  } else if (before.sa_handler == SIG_DFL || info->si_code > 0) {
    sigaction(SIGILL, &before, nullptr);  // the instruction traps again, which ends the process
  }
}

bool ExecuteTile() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  // The configuration has palette 1, and one row of four bytes in tile 0.
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;
  config[16] = 4;
  config[48] = 1;
  trial_thread = pthread_self();
  struct sigaction action = {};
  action.sa_sigaction = HandleTrialSigill;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, nullptr, &action_before_trial);  // must be stored before the handler runs
  sigaction(SIGILL, &action, nullptr);
  // A trap of a blocked SIGILL would kill the process.
  sigset_t sigill, mask_before;
  sigemptyset(&sigill);
  sigaddset(&sigill, SIGILL);
  pthread_sigmask(SIG_UNBLOCK, &sigill, &mask_before);
  volatile bool configured = false;
  const bool executes = sigsetjmp(trial_failed, 1) == 0;
  if (executes) {
    asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
    configured = true;
    asm volatile("tilezero %%tmm0\n\ttilerelease" : : : "memory");
  } else if (configured) {
    configured = false;  // this may trap, too
    asm volatile("tilerelease" : : : "memory");
  }
  pthread_sigmask(SIG_SETMASK, &mask_before, nullptr);
  sigaction(SIGILL, &action_before_trial, nullptr);
  return executes;
}

}  // namespace

MachineAnswers AskMachine() {
  MachineAnswers answers = {.advertised = {},
                            .xcr0 = ReadXcr0(),
                            .palette = ReadPalette(),
                            .permit_tiles = PermitTiles,
                            .execute_tile = ExecuteTile};
  // The builtin accepts only a literal, so a test for each feature is generated.
  __builtin_cpu_init();
#define CPUMOE_FEATURE_ROW(feature) \
  if (__builtin_cpu_supports(feature)) answers.advertised.insert(feature);
#include "feature_table.inc"
#undef CPUMOE_FEATURE_ROW
  return answers;
}

}  // namespace cpumoe

#else

namespace cpumoe {

MachineAnswers AskMachine() { return {}; }

}  // namespace cpumoe

#endif
