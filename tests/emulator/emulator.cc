// The SIGILL handler. See emulator.h.
//
// Everything that runs in the handler is async-signal-safe. It allocates nothing and takes no lock.
// The only system calls are arch_prctl (for FS and GS operands), sigaction (for a fatal SIGILL),
// and those that end the process because of a wrong tile shape.
#include "emulator.h"

#if defined(__x86_64__) && defined(__linux__)

#include <atomic>
#include <mutex>

#include "amx_tiles.h"
#include "avx512_bf16.h"
#include "avx_vnni.h"
#include "signal_frame.h"
#include "x86_decode.h"

namespace cpumoe::emulator {
namespace {

// Counts only grow. A reset stores the counts of its time.
std::atomic<uint64_t> counts[kNumInstructions], counts_at_reset[kNumInstructions];
std::atomic<uint64_t> traps, traps_at_reset;

std::mutex mutex;
std::atomic<bool> installed;
// The action that was installed before this handler. A new action goes into the other slot, so that
// a handler running on another thread reads a consistent action.
struct sigaction chained_slots[2];
std::atomic<const struct sigaction*> chained{&chained_slots[0]};

void SetChained(const struct sigaction& action) {
  struct sigaction* slot =
      chained.load() == &chained_slots[0] ? &chained_slots[1] : &chained_slots[0];
  *slot = action;
  chained.store(slot, std::memory_order_release);
}

bool Emulate(const DecodedInstruction& decoded, SignalFrame* frame, Instruction* executed) {
  if (EmulateAvxVnni(decoded, frame, executed)) return true;
  return frame->HasAvx512() &&
         (EmulateAvx512Bf16(decoded, frame, executed) || EmulateAmx(decoded, *frame, executed));
}

// Emulates from the instruction that trapped up to the first one that is not emulated, which saves
// signals. Each instruction is committed before the next begins, so a faulting operand leaves a
// precise state.
bool EmulateRun(void* context) {
  SignalFrame frame(context);
  if (!frame.HasAvx()) return false;
  bool emulated = false;
  DecodedInstruction decoded;
  while (Decode(reinterpret_cast<const uint8_t*>(frame.rip()), &decoded)) {
    Instruction executed;
    if (Emulate(decoded, &frame, &executed)) {
      counts[static_cast<int>(executed)].fetch_add(1, std::memory_order_relaxed);
      emulated = true;
    } else if (!emulated || !EmulateLoad(decoded, &frame)) {
      break;
    }
    frame.set_rip(frame.rip() + decoded.length);
  }
  if (emulated) traps.fetch_add(1, std::memory_order_relaxed);
  return emulated;
}

// Does what would have happened without this handler. It ignores the mask and SA_RESETHAND of the
// chained action, because few SIGILL handlers return.
void Chain(int signal, siginfo_t* info, void* context) {
  const struct sigaction& action = *chained.load(std::memory_order_acquire);
  const bool trapped = info->si_code > 0;  // false if kill() sent the signal
  if ((action.sa_flags & SA_SIGINFO) != 0) {
    action.sa_sigaction(signal, info, context);
  } else if (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN) {
    action.sa_handler(signal);
  } else if (trapped || action.sa_handler == SIG_DFL) {
    // After the return the instruction traps again, and the process dies at its address. A signal
    // that kill() sent is raised again.
    installed.store(false);
    struct sigaction fatal = {};
    fatal.sa_handler = SIG_DFL;
    sigaction(signal, &fatal, nullptr);
    if (!trapped) raise(signal);
  }
}

void HandleSigill(int signal, siginfo_t* info, void* context) {
  if (info->si_code > 0 && EmulateRun(context)) return;
  Chain(signal, info, context);
}

}  // namespace

bool Supports(std::string_view feature) {
  __builtin_cpu_init();
  if (feature == "avxvnni") return __builtin_cpu_supports("avx2") != 0;
  for (const InstructionInfo& info : kInstructions) {
    if (feature == info.feature) return __builtin_cpu_supports("avx512f") != 0;
  }
  return false;
}

void Install() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (installed.load() || !Supports("avxvnni")) return;
  SignalFrame::Initialize();
  struct sigaction previous = {};
  sigaction(SIGILL, nullptr, &previous);
  SetChained(previous);
  struct sigaction action = {};
  action.sa_sigaction = HandleSigill;
  // SA_NODEFER lets a handler for the fault of an operand jump out of this handler.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, nullptr);
  installed.store(true);
}

void Uninstall() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!installed.exchange(false)) return;
  struct sigaction current = {};
  sigaction(SIGILL, nullptr, &current);
  if (current.sa_sigaction == HandleSigill) sigaction(SIGILL, chained.load(), nullptr);
}

uint64_t TotalCount(Instruction instruction) {
  return counts[static_cast<int>(instruction)].load(std::memory_order_relaxed);
}

uint64_t Count(Instruction instruction) {
  return TotalCount(instruction) -
         counts_at_reset[static_cast<int>(instruction)].load(std::memory_order_relaxed);
}

uint64_t Traps() {
  return traps.load(std::memory_order_relaxed) - traps_at_reset.load(std::memory_order_relaxed);
}

void ResetCounts() {
  for (int i = 0; i < kNumInstructions; ++i) {
    counts_at_reset[i].store(counts[i].load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
  traps_at_reset.store(traps.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

bool ReplaceChainedAction(const struct sigaction* action, struct sigaction* old_action) {
  if (!installed.load()) return false;
  const struct sigaction old = *chained.load();
  if (action != nullptr) SetChained(*action);
  if (old_action != nullptr) *old_action = old;
  return true;
}

}  // namespace cpumoe::emulator

#else

namespace cpumoe::emulator {

bool Supports(std::string_view) { return false; }
void Install() {}
void Uninstall() {}
uint64_t Count(Instruction) { return 0; }
uint64_t TotalCount(Instruction) { return 0; }
uint64_t Traps() { return 0; }
void ResetCounts() {}
bool ReplaceChainedAction(const struct sigaction*, struct sigaction*) { return false; }

}  // namespace cpumoe::emulator

#endif
