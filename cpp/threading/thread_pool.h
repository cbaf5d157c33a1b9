// The abstract thread pool that operators run on.
//
// Operators see only this interface. It keeps the pool (one binary, baseline instructions) and the
// operators (one library per ISA) apart, and lets tests substitute a serial pool.
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <type_traits>
#include <utility>

namespace cpumoe {

class ThreadPool {
 public:
  using Task = void (*)(void* context, int64_t task, int thread);
  using NodeTask = void (*)(void* context, int node, int64_t task, int thread);

  // What a thread does when the tasks of its own node are done.
  enum class WhenDone {
    kHelp,  // it takes tasks of the node that has most left
    kWait,  // nothing, so that each task runs on its node
  };

  virtual ~ThreadPool() = default;

  // The number of threads that take part in ParallelFor, the caller included.
  virtual int num_threads() const = 0;

  // The number of NUMA nodes among which the threads are divided, at least 1.
  virtual int num_nodes() const { return 1; }

  // Runs task(context, i, thread) once for every i in [0, num_tasks), with 0 <= thread <
  // num_threads(), and returns when all have finished. Tasks are handed out in ascending order, to
  // whichever thread is free. A pool of several nodes divides the tasks among them, one range each.
  // The caller takes part as thread 0.
  //
  // The first exception that a task throws is rethrown here, after all threads have stopped. Tasks
  // that had not begun by then are dropped. Only one call may run at a time, and the owner of the
  // pool serialises callers.
  virtual void ParallelFor(int64_t num_tasks, Task task, void* context) = 0;

  // Runs task(context, node, i, thread) once for every i in [0, tasks[node]) of every node, as
  // ParallelFor does. If the pool has so many nodes, a thread first takes tasks of its own node.
  // Otherwise any thread takes any task.
  virtual void ParallelForNodes(std::span<const int64_t> tasks, WhenDone /*when_done*/,
                                NodeTask task, void* context) {
    struct Job {
      std::span<const int64_t> tasks;
      NodeTask task;
      void* context;
    } job = {tasks, task, context};
    ParallelFor(
        std::accumulate(tasks.begin(), tasks.end(), int64_t{0}),
        [](void* context, int64_t i, int thread) {
          const Job& job = *static_cast<Job*>(context);
          int node = 0;
          for (; i >= job.tasks[node]; ++node) i -= job.tasks[node];
          job.task(job.context, node, i, thread);
        },
        &job);
  }

  // ParallelForNodes for any callable body(int node, int64_t task, int thread).
  template <class Body>
  void ForNodes(std::span<const int64_t> tasks, Body&& body, WhenDone when_done = WhenDone::kHelp) {
    using Fn = std::remove_reference_t<Body>;
    ParallelForNodes(
        tasks, when_done,
        [](void* context, int node, int64_t task, int thread) {
          (*static_cast<Fn*>(context))(node, task, thread);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

  // ParallelFor for any callable body(int64_t task, int thread).
  template <class Body>
  void For(int64_t num_tasks, Body&& body) {
    using Fn = std::remove_reference_t<Body>;
    ParallelFor(
        num_tasks,
        [](void* context, int64_t task, int thread) { (*static_cast<Fn*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// Runs everything on the calling thread.
class SerialPool final : public ThreadPool {
 public:
  int num_threads() const override { return 1; }
  void ParallelFor(int64_t num_tasks, Task task, void* context) override {
    for (int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
  }
};

// Returns how many of `count` pieces of work one task takes: a power of two, at most `most`, that
// leaves at least `tasks` tasks if there are enough pieces.
inline int64_t PiecesPerTask(int64_t count, int64_t tasks, int64_t most) {
  while (most > 1 && count < most * tasks) most /= 2;
  return most;
}

}  // namespace cpumoe
