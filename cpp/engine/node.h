// A node: CPUs that compute one call together, with the scratch memory of their calls.
//
// Its threads may be divided among the NUMA nodes of the machine (Options::nodes).
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
    // The NUMA nodes that the threads are divided among, in place of `threads` and `cpus`. The
    // driver runs on the first of them.
    std::vector<NodeThreads> nodes = {};
  };

  // Throws std::invalid_argument, and std::system_error if the system cannot start enough threads.
  explicit Node(const Options& options)
      : pool_({.threads = options.threads, .cpus = options.cpus, .nodes = options.nodes}),
        driver_(std::make_unique<Executor>(DriverCpus(options))) {}

  ThreadPool& pool() { return pool_; }
  Workspace& workspace() { return workspace_; }

  // The thread that makes submitted calls; null after RetireDriver.
  Executor* driver() { return driver_.get(); }
  // Hands the driver over. Destroying it runs the calls that are still queued.
  std::unique_ptr<Executor> RetireDriver() { return std::move(driver_); }

 private:
  static std::vector<int> DriverCpus(const Options& options) {
    const bool whole = !options.nodes.empty() && !options.nodes.front().one_cpu_each;
    const std::vector<int>& cpus =
        options.nodes.empty() ? options.cpus : options.nodes.front().cpus;
    if (cpus.empty()) return ProcessAffinity();
    return whole ? cpus : std::vector{cpus.front()};
  }

  PinnedPool pool_;
  Workspace workspace_;
  std::unique_ptr<Executor> driver_;  // last, because its jobs use the members above
};

}  // namespace cpumoe
