// A call that a runtime's driver makes, and its end.
#pragma once

#include <memory>
#include <utility>

#include "threading/executor.h"

namespace cpumoe {

// Whoever owns the memory that the call reads and writes keeps a PendingCall, too. The destructor
// waits for the call, even if an exception causes the destruction.
class PendingCall {
 public:
  PendingCall() = default;
  explicit PendingCall(std::shared_ptr<Completion> completion) noexcept
      : completion_(std::move(completion)) {}
  ~PendingCall() { WaitQuietly(); }
  PendingCall(PendingCall&& other) noexcept = default;
  PendingCall& operator=(PendingCall&& other) noexcept {
    if (this != &other) {
      WaitQuietly();
      completion_ = std::move(other.completion_);
    }
    return *this;
  }

  // The functions of Completion. A default-constructed PendingCall must not be asked.
  bool Done() const noexcept { return completion_->Done(); }
  void Wait() { completion_->Wait(); }
  // Waits for at most so many seconds. Negative numbers and NaN count as 0.
  bool WaitFor(double seconds);

  // Returns when the call has ended. Returns at once in a forked child, in which no thread makes
  // the call, and if there is no call. Ends the process on the driver thread that has yet to make
  // the call, because that thread would wait for itself.
  void WaitQuietly() noexcept;

 private:
  std::shared_ptr<Completion> completion_;
};

}  // namespace cpumoe
