// Asynchronous calls: one driver thread that runs jobs in the order of their submission, and long
// jobs step by step in between.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "threading/os_thread.h"
#include "threading/topology.h"

namespace cpumoe {

// The outcome of one job. Any number of threads may ask and wait. When the job counts as done,
// everything that it captured has been destroyed.
class Completion {
 public:
  bool Done() const noexcept { return done_.load(std::memory_order_acquire) != 0; }

  // Returns when the job is done, and rethrows the exception that the job threw, if any. Where the
  // wait would never end, it throws std::runtime_error in a forked child, in which no thread runs
  // the job, and std::logic_error on the driver thread itself.
  void Wait();

  // Waits for at most `timeout` and returns Done(). Does not rethrow the job's exception.
  bool WaitFor(std::chrono::nanoseconds timeout);

 private:
  friend class Executor;

  explicit Completion(const void* queue) : queue_(queue) {}
  void Finish(std::exception_ptr error);

  const void* const queue_;  // the executor's queue; only compared
  const ForkGuard fork_guard_;
  std::exception_ptr error_;          // written before done_
  std::atomic<uint32_t> done_{0};     // waiters park here
  std::atomic<uint32_t> waiters_{0};  // parked or about to be
};

class Executor {
 public:
  // The driver will run on `cpus`. Without `cpus` it will run where the thread that makes the
  // executor may run now, like the workers of a pool that this thread makes. The thread that
  // submits the first job and starts the driver has no influence. Where the operating system
  // refuses `cpus`, the driver runs where the maker may run.
  explicit Executor(std::vector<int> cpus = ProcessAffinity());
  // Runs the queued jobs, then ends the driver. If the destructor runs on the driver thread (a job
  // owned the executor), the driver does both after the destructor has returned. In a forked child
  // the queue is leaked.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Queues a job. Any thread may call. The first call starts the driver, and throws
  // std::system_error if it cannot. Throws std::runtime_error in a forked child.
  std::shared_ptr<Completion> Submit(std::function<void()> job);

  // Queues a job in steps, which gives way to the jobs of Submit: those run first, also between two
  // steps. The job ends when step() returns false or throws. Such jobs run one after the other, in
  // the order of their submission. Errors are those of Submit.
  std::shared_ptr<Completion> SubmitSteps(std::function<bool()> step);

  // Whether the calling thread is the driver.
  bool IsDriver() const;

 private:
  struct Queue;
  struct Entry;
  std::shared_ptr<Completion> Enqueue(Entry entry);
  static void Drive(Queue& queue);

  const ForkGuard fork_guard_;
  const std::vector<int> cpus_;
  const std::vector<int> makers_cpus_ = ProcessAffinity();
  std::shared_ptr<Queue> queue_;
};

}  // namespace cpumoe
