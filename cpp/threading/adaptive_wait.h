// Waiting for another thread. A waiting thread polls for a short time, then parks.
//
// Between polls a thread yields only if the threads outnumber the CPUs. Linux (6.18) takes a time
// slice from a thread that yields. Next to a busy process, yielding makes calls a fifth to a third
// slower.
#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>

namespace cpumoe {

inline void CpuRelax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Remembers for one place in the code whether polling pays there. One thread uses it at a time.
class AdaptiveWait {
 public:
  using Clock = std::chrono::steady_clock;

  // Polls for at most `budget`. `crowded` says that the threads outnumber the CPUs. The thread that
  // we wait for may then need this very CPU, so the waiting thread yields between polls.
  AdaptiveWait(std::chrono::nanoseconds budget, bool crowded)
      : budget_(budget), crowded_(crowded) {}

  // Returns once ready() holds. park() may return early and is then called again.
  template <class Ready, class Park>
  void Wait(Ready ready, Park park) {
    if (ready()) return;
    const Clock::time_point start = Clock::now();
    if (Poll(ready, start)) {
      misses_ = 0;
      return;
    }
    while (!ready()) park();
    // A wait that ended within the full budget shows that polling pays again.
    misses_ = Clock::now() - start <= budget_ ? 0 : std::min(misses_ + 1, kMaxMisses);
  }

 private:
  static constexpr int kMaxMisses = 4;
  static constexpr int kPollsPerClockRead = 16;

  template <class Ready>
  bool Poll(Ready ready, Clock::time_point start) const {
    const Clock::time_point deadline = start + budget_ / (1 << misses_);
    while (Clock::now() < deadline) {
      if (crowded_) sched_yield();
      for (int i = 0; i < kPollsPerClockRead; ++i) {
        if (ready()) return true;
        CpuRelax();
      }
    }
    return false;
  }

  const std::chrono::nanoseconds budget_;
  const bool crowded_;
  // Successive waits that outlasted the budget. Each of them halves the next poll.
  int misses_ = 0;
};

}  // namespace cpumoe
