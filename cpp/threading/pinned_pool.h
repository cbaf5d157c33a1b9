// The thread pool that the engine runs on: persistent threads that poll briefly, then park.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <vector>

#include "threading/adaptive_wait.h"
#include "threading/os_thread.h"
#include "threading/thread_pool.h"

namespace cpumoe {

class PinnedPool final : public ThreadPool {
 public:
  struct Options {
    int threads = 1;  // the caller of ParallelFor included; 1 to kMaxThreads
    // Thread t runs on cpus[t % cpus.size()]. Thread 0 is the caller, whose affinity is never
    // changed, so cpus[0] stays free for it. Without `cpus`, and if the operating system refuses a
    // CPU, a thread runs where the thread that makes the pool may run.
    std::vector<int> cpus = {};
    std::chrono::microseconds spin{50};  // longest polling before a waiting thread parks
  };
  static constexpr int kMaxThreads = 4096;

  // Throws std::invalid_argument, and std::system_error if the system cannot start enough threads.
  explicit PinnedPool(const Options& options);
  ~PinnedPool() override;
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  int num_threads() const override { return threads_; }
  int num_pinned() const { return num_pinned_; }

  // Also throws std::logic_error if a call already runs on this pool, and std::runtime_error in a
  // forked child, in which the pool's threads do not exist.
  void ParallelFor(int64_t num_tasks, Task task, void* context) override;

 private:
  struct Job {
    Task task = nullptr;
    void* context = nullptr;
    int64_t num_tasks = 0;
  };

  // `state_` is one word: bit 31 stop | bits 16..30 workers wanted | bits 0..15 workers active. A
  // worker joins a job by turning one `wanted` into one `active`. A thread that finds no task left
  // clears `wanted`, so no thread waits for a worker that comes late. The job ends at active == 0.
  static constexpr uint32_t kOneActive = 1;
  static constexpr uint32_t kActiveMask = 0xffff;
  static constexpr uint32_t kOneWanted = 1u << 16;
  static constexpr uint32_t kWantedMask = 0x7fffu << 16;
  static constexpr uint32_t kStop = 1u << 31;
  static constexpr size_t kCacheLine = 128;  // x86 fetches cache lines in pairs

  void StartWorkers(const Options& options);
  void StopWorkers();
  void WorkerMain(int thread);
  bool AwaitJob(AdaptiveWait& wait);
  bool EnterJob();
  void LeaveJob();
  void JoinWorkers();
  void WakeWorkers();
  void RunTasks(int thread);

  const int threads_;
  const bool crowded_;
  const std::chrono::microseconds spin_;
  const ForkGuard fork_guard_;
  std::vector<pthread_t> workers_;
  int num_pinned_ = 0;
  AdaptiveWait caller_wait_;

  alignas(kCacheLine) std::atomic<uint32_t> state_{0};  // idle workers park here
  Job job_;                                             // read by active workers only
  alignas(kCacheLine) std::atomic<int64_t> next_{0};    // the next task to hand out
  alignas(kCacheLine) std::atomic<uint32_t> parked_workers_{0};
  std::atomic<uint32_t> caller_parked_{0};  // 1 while the caller sleeps on this word
  std::atomic<bool> busy_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by the thread that sets failed_
};

}  // namespace cpumoe
