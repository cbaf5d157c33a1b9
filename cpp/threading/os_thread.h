// Threads of the operating system, and a guard that notices a fork of the process.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cpumoe {

// Starts a thread that runs body(), which must not throw. The thread blocks all signals except
// synchronous faults, so that the process's handlers run on other threads (Python's on the main
// thread). Debuggers show `name`, at most 15 characters of it. Throws std::system_error.
pthread_t StartThread(std::string name, std::function<void()> body);

// CPUs have smaller numbers than this.
inline constexpr int kMaxCpus = 1 << 16;

// Restricts a thread to some CPUs. Returns false if the operating system refuses, and if there is
// no CPU or one has an impossible number.
bool SetAffinity(pthread_t thread, const std::vector<int>& cpus);

// Tells whether the process was forked after this object was made. Threads started before a fork do
// not exist in the child. A check costs one load.
class ForkGuard {
 public:
  ForkGuard();  // throws std::system_error
  bool forked() const noexcept;
  // Throws std::runtime_error in a forked child. The message begins with `subject`.
  void ThrowIfForked(const char* subject) const;

 private:
  uint32_t generation_;
};

}  // namespace cpumoe
