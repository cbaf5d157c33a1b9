// Asynchronous calls: one driver thread that runs jobs in the order of their submission.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>

#include "threading/os_thread.h"

namespace cpumoe {

// The outcome of one job. Any number of threads may ask and wait. What the job captured has been
// destroyed by the time it counts as done.
class Completion {
 public:
  bool Done() const noexcept { return done_.load(std::memory_order_acquire) != 0; }

  // Returns when the job is done and rethrows the exception that it threw, if any. Instead of
  // waiting for ever it throws std::runtime_error in a forked child, where nobody runs the job, and
  // std::logic_error on the driver thread itself.
  void Wait();

  // The same, but at most `timeout`, and without the job's exception: returns Done().
  bool WaitFor(std::chrono::nanoseconds timeout);

 private:
  friend class Executor;

  explicit Completion(const void* queue) : queue_(queue) {}
  void Finish(std::exception_ptr error);

  const void* const queue_;  // the executor's; only compared
  const ForkGuard fork_guard_;
  std::exception_ptr error_;          // written before done_
  std::atomic<uint32_t> done_{0};     // waiters park here
  std::atomic<uint32_t> waiters_{0};  // parked or about to be
};

class Executor {
 public:
  Executor();
  // Runs what is queued, then ends the driver. On the driver thread (a job owned the executor) the
  // driver does so after the destructor; in a forked child the queue is leaked.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Queues a job; any thread may call. The first call starts the driver, and throws
  // std::system_error where it cannot. Throws std::runtime_error in a forked child.
  std::shared_ptr<Completion> Submit(std::function<void()> job);

 private:
  struct Queue;
  static void Drive(Queue& queue);

  const ForkGuard fork_guard_;
  std::shared_ptr<Queue> queue_;
};

}  // namespace cpumoe
