// Operating-system threads, and the news that the process was forked.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <functional>
#include <string>

namespace cpumoe {

// Starts a thread that runs body(), which must not throw. All signals but synchronous faults are
// blocked in it, so that the process's handlers run elsewhere (Python's: on the main thread).
// `name` shows in debuggers, at most 15 characters. Throws std::system_error.
pthread_t StartThread(std::string name, std::function<void()> body);

// Restricts a thread to one CPU; false where the kernel refuses.
bool PinThread(pthread_t thread, int cpu);

// Tells whether the process was forked since this object was made: threads started before a fork do
// not exist in the child. Costs one load.
class ForkGuard {
 public:
  ForkGuard();  // throws std::system_error
  bool forked() const noexcept;
  // Throws std::runtime_error in a forked child; `subject` begins its message.
  void ThrowIfForked(const char* subject) const;

 private:
  uint32_t generation_;
};

}  // namespace cpumoe
