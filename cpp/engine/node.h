// A node: CPUs that compute one call together, with the scratch memory of their calls.
//
// A runtime has one node now, which is the whole machine. A NUMA machine can have one node for each
// of its memories.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "moe/workspace.h"
#include "threading/executor.h"
#include "threading/pinned_pool.h"
#include "threading/topology.h"

namespace cpumoe {

// Not synchronised: the runtime that owns a node decides who may use which part of it.
class Node {
 public:
  struct Options {
    int threads = 1;  // that compute one call, the thread that makes the call included
    // Thread t runs on cpus[t % cpus.size()]. If `cpus` is empty, the threads and the driver run
    // where the thread that makes the node may run, whichever thread makes calls later. The driver
    // is thread 0 of the calls that it makes. A caller that makes a call itself keeps the affinity
    // that it has.
    std::vector<int> cpus = {};
  };

  // Throws std::invalid_argument, and std::system_error if the system cannot start enough threads.
  explicit Node(const Options& options)
      : pool_({.threads = options.threads, .cpus = options.cpus}),
        driver_(std::make_unique<Executor>(
            options.cpus.empty() ? ProcessAffinity() : std::vector{options.cpus.front()})) {}

  ThreadPool& pool() { return pool_; }
  Workspace& workspace() { return workspace_; }

  // The thread that makes submitted calls; null after RetireDriver.
  Executor* driver() { return driver_.get(); }
  // Hands the driver over. Destroying it runs the calls that are still queued.
  std::unique_ptr<Executor> RetireDriver() { return std::move(driver_); }

 private:
  PinnedPool pool_;
  Workspace workspace_;
  std::unique_ptr<Executor> driver_;  // last, because its jobs use the members above
};

}  // namespace cpumoe
