// A runtime: the nodes that calls of all layers run on, and the order of these calls.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/memory_node.h"
#include "engine/node.h"
#include "threading/executor.h"
#include "threading/os_thread.h"

namespace cpumoe {

// Any thread may make calls, also one that this process did not start through us. The calls run one
// after the other. In a forked child every function but Close throws std::runtime_error.
class Runtime : public std::enable_shared_from_this<Runtime> {
 public:
  struct Options {
    Node::Options node;
    // Whether a thread that makes a call computes, too. Otherwise the driver takes its place and
    // the caller waits, so that nothing but the driver and the pool computes, on the CPUs that
    // `node` names.
    bool callers_compute = true;
  };

  // What runs on a node. It may throw, and must not make calls on the runtime itself.
  using Body = std::function<void(Node&)>;

  // One step of longer work. Returns whether there are more.
  using Step = std::function<bool(Node&)>;

  // Throws what Node throws.
  static std::shared_ptr<Runtime> Create(const Options& options);

  // A forked child leaks the node, because another thread of the parent may have been changing it.
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // The NUMA nodes of the threads, among whose memories layers should be divided. Empty: the
  // runtime does not look at nodes.
  const std::vector<MemoryNode>& nodes() const { return nodes_; }

  // Stops the threads after the queued calls have run. Later calls throw std::runtime_error. Any
  // thread may close a runtime, also one that others use or close, but none of its own threads may.
  void Close();

  // Runs body(node), and returns when it has ended. Rethrows what the body throws.
  template <class F>
  void Execute(F&& body) {
    fork_guard_.ThrowIfForked(kSubject);  // before a mutex, whose owner may not exist in a child
    if (callers_compute_) {
      Run(body);
    } else {
      ExecuteOnDriver([&body](Node& node) { body(node); });
    }
  }

  // Queues body(node) for the driver thread. The queued body keeps the runtime alive.
  std::shared_ptr<Completion> Submit(Body body);

  // Long work that gives way to calls. step(node) runs again and again until it returns false or
  // throws, and calls that wait run between two steps. Returns when the last step has ended.
  void ExecuteSteps(const Step& step);
  // Queues such work for the driver thread. The queued work keeps the runtime alive.
  std::shared_ptr<Completion> SubmitSteps(Step step);

 private:
  static constexpr char kSubject[] = "Runtime";

  explicit Runtime(const Options& options);

  template <class F>
  auto Run(F& body) {
    std::unique_lock turn(turn_mutex_);
    const std::lock_guard lock(run_mutex_);
    turn.unlock();
    RequireOpen(node_ != nullptr);
    return body(*node_);
  }
  void ExecuteOnDriver(const Body& body);
  Executor& Driver();  // requires submit_mutex_
  static void RequireOpen(bool open);

  const ForkGuard fork_guard_;
  const bool callers_compute_;
  const std::vector<MemoryNode> nodes_;
  // Locked in this order. Submitting takes submit_mutex_ alone, and never waits for a body.
  std::mutex close_mutex_;  // held by the thread that closes
  // Held by the thread whose body is next. Without this mutex, a thread with many steps could lock
  // run_mutex_ again and again before a call wakes up that waits for it.
  std::mutex turn_mutex_;
  std::mutex run_mutex_;        // held while a body runs
  std::mutex submit_mutex_;     // guards the node's driver
  std::unique_ptr<Node> node_;  // null once closed; reset under all but turn_mutex_
};

}  // namespace cpumoe
