#include "threading/pinned_pool.h"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "base/float_environment.h"
#include "threading/futex.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

constexpr char kSubject[] = "thread pool";

int CheckedThreads(int threads) {
  if (threads < 1 || threads > PinnedPool::kMaxThreads) {
    throw std::invalid_argument("thread pool: threads must be from 1 to " +
                                std::to_string(PinnedPool::kMaxThreads) + ", got " +
                                std::to_string(threads));
  }
  return threads;
}

// The CPUs that the pool's threads share.
size_t UsableCpus(const PinnedPool::Options& options) {
  if (options.cpus.empty()) return ProcessAffinity().size();
  return std::set<int>(options.cpus.begin(), options.cpus.end()).size();
}

class BusyScope {
 public:
  explicit BusyScope(std::atomic<bool>& busy) : busy_(busy) {
    if (busy_.exchange(true, std::memory_order_acquire)) {
      throw std::logic_error(
          "thread pool: ParallelFor called while another call runs on the same pool (from one of "
          "its tasks, or from a second thread); use another pool or wait for that call");
    }
  }
  ~BusyScope() { busy_.store(false, std::memory_order_release); }
  BusyScope(const BusyScope&) = delete;
  BusyScope& operator=(const BusyScope&) = delete;

 private:
  std::atomic<bool>& busy_;
};

}  // namespace

PinnedPool::PinnedPool(const Options& options)
    : threads_(CheckedThreads(options.threads)),
      crowded_(static_cast<size_t>(threads_) > UsableCpus(options)),
      spin_(options.spin),
      caller_wait_(spin_, crowded_) {
  StartWorkers(options);
}

PinnedPool::~PinnedPool() {
  if (!fork_guard_.forked()) StopWorkers();
}

void PinnedPool::StartWorkers(const Options& options) {
  workers_.reserve(static_cast<size_t>(threads_ - 1));
  try {
    for (int t = 1; t < threads_; ++t) {
      workers_.push_back(StartThread("cpumoe-" + std::to_string(t), [this, t] { WorkerMain(t); }));
      if (!options.cpus.empty()) {
        const int cpu = options.cpus[static_cast<size_t>(t) % options.cpus.size()];
        num_pinned_ += SetAffinity(workers_.back(), {cpu}) ? 1 : 0;
      }
    }
  } catch (const std::system_error& error) {
    StopWorkers();
    throw std::system_error(error.code(),
                            "thread pool: wanted " + std::to_string(threads_) + " threads, got " +
                                std::to_string(workers_.size() + 1) +
                                "; ask for fewer, or raise the limit on processes or memory");
  } catch (...) {
    StopWorkers();
    throw;
  }
}

void PinnedPool::StopWorkers() {
  state_.fetch_or(kStop);
  FutexWake(state_, std::numeric_limits<int>::max());
  for (const pthread_t worker : workers_) pthread_join(worker, nullptr);
}

void PinnedPool::ParallelFor(int64_t num_tasks, Task task, void* context) {
  if (num_tasks <= 0) return;
  fork_guard_.ThrowIfForked(kSubject);
  const BusyScope busy(busy_);
  const DefaultFloatEnvironment environment;
  if (num_tasks == 1 || threads_ == 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
    return;
  }
  job_ = Job{task, context, num_tasks};
  next_.store(0, std::memory_order_relaxed);
  const auto wanted = static_cast<uint32_t>(std::min<int64_t>(threads_, num_tasks) - 1);
  state_.store(wanted * kOneWanted);
  WakeWorkers();
  RunTasks(0);
  JoinWorkers();
  if (failed_.load(std::memory_order_relaxed)) {
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void PinnedPool::RunTasks(int thread) {
  const Job job = job_;
  try {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= job.num_tasks) return;
      job.task(job.context, task, thread);
    }
  } catch (...) {
    next_.store(job.num_tasks, std::memory_order_relaxed);
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

// A wake-up costs the thread that wakes a microsecond or more. Therefore the caller wakes two
// workers, and each of them wakes two more before it works. Sequential consistency pairs this
// function with AwaitJob: either the caller sees the parked worker, or the worker sees the job.
void PinnedPool::WakeWorkers() {
  const uint32_t wanted = (state_.load() & kWantedMask) / kOneWanted;
  if (wanted == 0 || parked_workers_.load() == 0) return;
  FutexWake(state_, static_cast<int>(std::min(wanted, 2u)));
}

void PinnedPool::JoinWorkers() {
  if ((state_.fetch_and(~kWantedMask) & kActiveMask) == 0) return;
  caller_wait_.Wait([this] { return (state_.load(std::memory_order_acquire) & kActiveMask) == 0; },
                    [this] {
                      fork_guard_.ThrowIfForked(kSubject);  // a task forked, and this is the child
                      caller_parked_.store(1);
                      if ((state_.load() & kActiveMask) != 0) FutexWait(caller_parked_, 1);
                      caller_parked_.store(0, std::memory_order_relaxed);
                    });
}

void PinnedPool::WorkerMain(int thread) {
  const DefaultFloatEnvironment environment;
  AdaptiveWait wait(spin_, crowded_);
  for (;;) {
    const bool parked = AwaitJob(wait);
    if ((state_.load(std::memory_order_relaxed) & kStop) != 0) return;
    if (!EnterJob()) continue;
    if (parked) WakeWorkers();
    RunTasks(thread);
    LeaveJob();
  }
}

// Returns whether the worker slept while it waited.
bool PinnedPool::AwaitJob(AdaptiveWait& wait) {
  bool parked = false;
  wait.Wait(
      [this] { return (state_.load(std::memory_order_relaxed) & (kWantedMask | kStop)) != 0; },
      [this, &parked] {
        parked = true;
        parked_workers_.fetch_add(1);
        const uint32_t state = state_.load();
        if ((state & (kWantedMask | kStop)) == 0) FutexWait(state_, state);
        parked_workers_.fetch_sub(1);
      });
  return parked;
}

bool PinnedPool::EnterJob() {
  uint32_t state = state_.load(std::memory_order_relaxed);
  while ((state & kWantedMask) != 0) {
    if (state_.compare_exchange_weak(state, state - kOneWanted + kOneActive,
                                     std::memory_order_acquire, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

void PinnedPool::LeaveJob() {
  // The job cannot end while this worker is active, so this clears `wanted` of no later job.
  if ((state_.load(std::memory_order_relaxed) & kWantedMask) != 0) state_.fetch_and(~kWantedMask);
  const uint32_t before = state_.fetch_sub(kOneActive);
  if ((before & kActiveMask) != kOneActive || caller_parked_.load() == 0) return;
  caller_parked_.store(0);
  FutexWake(caller_parked_, 1);
}

}  // namespace cpumoe
