#include "engine/pending_call.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace cpumoe {

bool PendingCall::WaitFor(double seconds) {
  constexpr double kLongest = 1e9;  // 2^63 ns are 9.2e9 s
  const double bounded = seconds > 0 ? std::min(seconds, kLongest) : 0.0;
  return completion_->WaitFor(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(bounded)));
}

void PendingCall::WaitQuietly() noexcept {
  if (completion_ == nullptr) return;
  try {
    completion_->WaitFor(std::chrono::nanoseconds::max());
  } catch (const std::runtime_error&) {  // NOLINT(bugprone-empty-catch)
    // This process is a forked child.
  }
}

}  // namespace cpumoe
