#include "threading/os_thread.h"

#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace cpumoe {
namespace {

struct Start {
  std::string name;
  std::function<void()> body;
};

void* Run(void* argument) {
  const std::unique_ptr<Start> start(static_cast<Start*>(argument));
  pthread_setname_np(pthread_self(), start->name.substr(0, 15).c_str());
  start->body();
  return nullptr;
}

sigset_t AsynchronousSignals() {
  sigset_t set;
  sigfillset(&set);
  for (int fault : {SIGSEGV, SIGILL, SIGBUS, SIGFPE, SIGTRAP, SIGSYS}) sigdelset(&set, fault);
  return set;
}

std::atomic<uint32_t> fork_generation{0};

void CountFork() { fork_generation.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

pthread_t StartThread(std::string name, std::function<void()> body) {
  auto start = std::make_unique<Start>(Start{std::move(name), std::move(body)});
  // A new thread inherits the mask. If the thread set the mask itself, signals could reach it
  // before.
  const sigset_t blocked = AsynchronousSignals();
  sigset_t previous;
  pthread_sigmask(SIG_SETMASK, &blocked, &previous);
  pthread_t thread;
  const int error = pthread_create(&thread, nullptr, Run, start.get());
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  if (error != 0) {
    throw std::system_error(error, std::generic_category(), "cannot start thread " + start->name);
  }
  static_cast<void>(start.release());  // Run owns it now
  return thread;
}

bool SetAffinity(pthread_t thread, const std::vector<int>& cpus) {
  const auto possible = [](int cpu) { return cpu >= 0 && cpu < kMaxCpus; };
  if (cpus.empty() || !std::ranges::all_of(cpus, possible)) return false;
  const int size = *std::ranges::max_element(cpus) + 1;
  const size_t bytes = CPU_ALLOC_SIZE(size);
  cpu_set_t* const set = CPU_ALLOC(size);
  if (set == nullptr) return false;
  CPU_ZERO_S(bytes, set);
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set);
  const int error = pthread_setaffinity_np(thread, bytes, set);
  CPU_FREE(set);
  return error == 0;
}

ForkGuard::ForkGuard() {
  static std::once_flag registered;
  std::call_once(registered, [] {
    if (const int error = pthread_atfork(nullptr, nullptr, CountFork); error != 0) {
      throw std::system_error(error, std::generic_category(), "pthread_atfork");
    }
  });
  generation_ = fork_generation.load(std::memory_order_relaxed);
}

bool ForkGuard::forked() const noexcept {
  return generation_ != fork_generation.load(std::memory_order_relaxed);
}

void ForkGuard::ThrowIfForked(const char* subject) const {
  if (!forked()) return;
  throw std::runtime_error(std::string(subject) +
                           ": its threads belong to the parent process and do not exist after "
                           "fork(); create a new Runtime in the child process");
}

}  // namespace cpumoe
