// A runtime: the threads and the scratch memory that forward calls of all layers share.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "moe/workspace.h"
#include "threading/executor.h"
#include "threading/os_thread.h"
#include "threading/pinned_pool.h"

namespace cpumoe {

// Any thread may make calls. The calls run one after the other.
class Runtime {
 public:
  explicit Runtime(const PinnedPool::Options& options)
      : pool_(std::make_unique<PinnedPool>(options)), executor_(std::make_unique<Executor>()) {}

  // Stops the threads after the queued calls have run. Later calls throw std::runtime_error.
  void Close() {
    // A forked child has no threads, and perhaps not the thread that owns the mutex.
    if (fork_guard_.forked()) return;
    std::unique_ptr<Executor> executor;
    {
      const std::lock_guard lock(submit_mutex_);
      executor = std::move(executor_);
    }
    executor.reset();  // runs the queued calls
    const std::lock_guard lock(run_mutex_);
    pool_.reset();
    workspace_ = Workspace();
  }

  // Runs body(pool, workspace) on the calling thread.
  template <class Body>
  void Execute(Body&& body) {
    fork_guard_.ThrowIfForked("Runtime");  // before the mutex, whose owner may not exist in a child
    const std::lock_guard lock(run_mutex_);
    CheckOpen(pool_ != nullptr);
    body(*pool_, workspace_);
  }

  // Queues body(pool, workspace) for the runtime's driver thread.
  std::shared_ptr<Completion> Submit(std::function<void(ThreadPool&, Workspace&)> body) {
    fork_guard_.ThrowIfForked("Runtime");
    const std::lock_guard lock(submit_mutex_);
    CheckOpen(executor_ != nullptr);
    return executor_->Submit([this, body = std::move(body)] { Execute(body); });
  }

 private:
  static void CheckOpen(bool open) {
    if (!open) throw std::runtime_error("this Runtime is closed; create a new one");
  }

  const ForkGuard fork_guard_;
  std::mutex run_mutex_;  // held while a body runs
  std::unique_ptr<PinnedPool> pool_;
  Workspace workspace_;
  std::mutex submit_mutex_;  // separate from run_mutex_, so that submitting never waits for a body
  std::unique_ptr<Executor> executor_;  // last, because its jobs use the members above
};

}  // namespace cpumoe
