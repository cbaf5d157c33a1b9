// The thread pool that the engine runs on: persistent threads that poll briefly, then park.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <vector>

#include "base/memory_node.h"
#include "threading/adaptive_wait.h"
#include "threading/os_thread.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// The threads of a NUMA node.
struct NodeThreads {
  MemoryNode memory;      // the node, and the number of threads, at least 1
  std::vector<int> cpus;  // where the threads run
  // Whether thread t of the node stays on cpus[t % cpus.size()]. Otherwise it moves among `cpus`.
  bool one_cpu_each = false;
};

class PinnedPool final : public ThreadPool {
 public:
  struct Options {
    int threads = 1;  // the caller of ParallelFor included; 1 to kMaxThreads
    // Thread t runs on cpus[t % cpus.size()]. Thread 0 is the caller, whose affinity is never
    // changed, so cpus[0] stays free for it. Without `cpus`, and if the operating system refuses a
    // CPU, a thread runs where the thread that makes the pool may run.
    std::vector<int> cpus = {};
    // The nodes of a pool that has them, which take the place of `threads` and `cpus`. The threads
    // of a node follow those of the node before it. At most kMaxMemoryNodes.
    std::vector<NodeThreads> nodes = {};
    std::chrono::microseconds spin{50};  // longest polling before a waiting thread parks
  };
  static constexpr int kMaxThreads = 4096;

  // Throws std::invalid_argument, and std::system_error if the system cannot start enough threads.
  explicit PinnedPool(const Options& options);
  ~PinnedPool() override;
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  int num_threads() const override { return threads_; }
  int num_nodes() const override { return num_teams_; }
  int num_pinned() const { return num_pinned_; }

  // Also throws std::logic_error if a call already runs on this pool, and std::runtime_error in a
  // forked child, in which the pool's threads do not exist.
  void ParallelFor(int64_t num_tasks, Task task, void* context) override;
  void ParallelForNodes(std::span<const int64_t> tasks, WhenDone when_done, NodeTask task,
                        void* context) override;

 private:
  static constexpr size_t kCacheLine = 128;  // x86 fetches cache lines in pairs

  struct Job {
    NodeTask task = nullptr;
    void* context = nullptr;
    WhenDone when_done = WhenDone::kHelp;
  };

  // The threads of a node, which meet each other before they meet other nodes. A cache line that
  // they all write thus stays in the node.
  //
  // `state` is one word: bit 31 stop | bits 16..30 workers wanted | bits 0..15 workers active. A
  // worker joins a job by turning one `wanted` into one `active`. A thread that finds no task left
  // clears `wanted`, so no thread waits for a worker that comes late. The team's part of the job
  // ends at active == 0 and wanted == 0, which happens once: the last worker reports it in
  // `running_`, or the caller if no worker has joined.
  struct Team {
    int first_thread = 0;
    int threads = 0;                                      // the caller included in the first team
    uint32_t wanted = 0;                                  // at the job's begin; the caller's alone
    alignas(kCacheLine) std::atomic<uint32_t> state{0};   // idle workers park here
    alignas(kCacheLine) std::atomic<int64_t> next{0};     // the next task to hand out
    int64_t end = 0;                                      // the number of tasks
    alignas(kCacheLine) std::atomic<uint32_t> parked{0};  // workers
  };
  static constexpr uint32_t kOneActive = 1;
  static constexpr uint32_t kActiveMask = 0xffff;
  static constexpr uint32_t kOneWanted = 1u << 16;
  static constexpr uint32_t kWantedMask = 0x7fffu << 16;
  static constexpr uint32_t kStop = 1u << 31;

  void StartWorkers(const Options& options);
  void Place(const Options& options, const Team& team, int thread);
  void StopWorkers();
  void WorkerMain(int team, int thread);
  static bool AwaitJob(Team& team, AdaptiveWait& wait);
  static bool EnterJob(Team& team);
  void LeaveJob(Team& team);
  void StartJob(std::span<const int64_t> tasks, const Job& job);
  void JoinWorkers();
  static void WakeWorkers(Team& team);
  void RunTasks(int team, int thread);
  int TeamWithMostLeft() const;
  std::span<Team> teams() const { return {teams_.get(), static_cast<size_t>(num_teams_)}; }

  const int threads_;
  const bool crowded_;
  const std::chrono::microseconds spin_;
  const ForkGuard fork_guard_;
  std::vector<pthread_t> workers_;
  int num_pinned_ = 0;
  AdaptiveWait caller_wait_;

  const int num_teams_;
  const std::unique_ptr<Team[]> teams_;
  Job job_;  // read by active workers only
  // Teams that have been asked for workers, and have not ended their part of the job.
  alignas(kCacheLine) std::atomic<uint32_t> running_{0};
  std::atomic<uint32_t> caller_parked_{0};  // 1 while the caller sleeps on this word
  alignas(kCacheLine) std::atomic<bool> busy_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by the thread that sets failed_
};

}  // namespace cpumoe
