// Waiting for another thread: poll for a short time, then park. Between polls it yields only where
// threads outnumber the CPUs: Linux (6.18) takes a time slice from a thread that yields, so that
// next to a busy process calls take a fifth to a third longer.
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

// One waiting place's memory of whether polling pays there. Used by one thread at a time.
class AdaptiveWait {
 public:
  using Clock = std::chrono::steady_clock;

  // Polls for at most `budget`. `crowded`: the threads outnumber the CPUs, so that whoever is
  // waited for may need this very CPU: give way at once.
  AdaptiveWait(std::chrono::nanoseconds budget, bool crowded)
      : budget_(budget), crowded_(crowded) {}

  // Returns once ready() holds. park() may return early; it is then called again.
  template <class Ready, class Park>
  void Wait(Ready ready, Park park) {
    if (ready()) return;
    const Clock::time_point start = Clock::now();
    if (Poll(ready, start)) {
      misses_ = 0;
      return;
    }
    while (!ready()) park();
    // Polling pays again as soon as what we wait for comes within the full budget.
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
  int misses_ = 0;  // waits in succession that outlasted the budget; each halves the next poll
};

}  // namespace cpumoe
