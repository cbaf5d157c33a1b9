#include "threading/pinned_pool.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "base/float_environment.h"
#include "threading/futex.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

constexpr char kSubject[] = "thread pool";

int CheckedThreads(const PinnedPool::Options& options) {
  int64_t threads = options.nodes.empty() ? options.threads : 0;
  for (const NodeThreads& node : options.nodes) {
    if (node.memory.threads < 1) {
      throw std::invalid_argument("thread pool: each node must have a thread, got " +
                                  std::to_string(node.memory.threads) + " for node " +
                                  std::to_string(node.memory.id));
    }
    threads += node.memory.threads;
  }
  if (threads < 1 || threads > PinnedPool::kMaxThreads) {
    throw std::invalid_argument("thread pool: threads must be from 1 to " +
                                std::to_string(PinnedPool::kMaxThreads) + ", got " +
                                std::to_string(threads));
  }
  return static_cast<int>(threads);
}

int CheckedTeams(const PinnedPool::Options& options) {
  if (options.nodes.size() > kMaxMemoryNodes) {
    throw std::invalid_argument("thread pool: nodes must be at most " +
                                std::to_string(kMaxMemoryNodes) + ", got " +
                                std::to_string(options.nodes.size()));
  }
  return std::max(static_cast<int>(options.nodes.size()), 1);
}

// The CPUs that the pool's threads share.
size_t UsableCpus(const PinnedPool::Options& options) {
  std::set<int> cpus(options.cpus.begin(), options.cpus.end());
  if (!options.nodes.empty()) cpus.clear();
  for (const NodeThreads& node : options.nodes) cpus.insert(node.cpus.begin(), node.cpus.end());
  return cpus.empty() ? ProcessAffinity().size() : cpus.size();
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
    : threads_(CheckedThreads(options)),
      crowded_(static_cast<size_t>(threads_) > UsableCpus(options)),
      spin_(options.spin),
      caller_wait_(spin_, crowded_),
      num_teams_(CheckedTeams(options)),
      teams_(std::make_unique<Team[]>(num_teams_)) {
  int first = 0;
  for (Team& team : teams()) {
    team.first_thread = first;
    team.threads =
        options.nodes.empty() ? threads_ : options.nodes[&team - teams_.get()].memory.threads;
    first += team.threads;
  }
  StartWorkers(options);
}

PinnedPool::~PinnedPool() {
  if (!fork_guard_.forked()) StopWorkers();
}

void PinnedPool::StartWorkers(const Options& options) {
  workers_.reserve(static_cast<size_t>(threads_ - 1));
  try {
    for (int i = 0; i < num_teams_; ++i) {
      const Team& team = teams_[i];
      for (int t = std::max(team.first_thread, 1); t < team.first_thread + team.threads; ++t) {
        workers_.push_back(
            StartThread("cpumoe-" + std::to_string(t), [this, i, t] { WorkerMain(i, t); }));
        Place(options, team, t);
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

// Lets the newest worker, thread `thread` of the pool, run where it should.
void PinnedPool::Place(const Options& options, const Team& team, int thread) {
  const NodeThreads* const node =
      options.nodes.empty() ? nullptr : &options.nodes[&team - teams_.get()];
  std::vector<int> cpus = node == nullptr ? options.cpus : node->cpus;
  if (cpus.empty()) return;
  if (node == nullptr || node->one_cpu_each) {
    cpus = {cpus[static_cast<size_t>(thread - team.first_thread) % cpus.size()]};
  }
  num_pinned_ += SetAffinity(workers_.back(), cpus) ? 1 : 0;
}

void PinnedPool::StopWorkers() {
  for (Team& team : teams()) {
    team.state.fetch_or(kStop);
    FutexWake(team.state, std::numeric_limits<int>::max());
  }
  for (const pthread_t worker : workers_) pthread_join(worker, nullptr);
}

void PinnedPool::ParallelFor(int64_t num_tasks, Task task, void* context) {
  // Node n has tasks [begins[n], begins[n + 1]), in proportion to its threads.
  struct Ranges {
    Task task;
    void* context;
    std::array<int64_t, kMaxMemoryNodes> begins;
  } ranges = {task, context, {}};
  std::array<int64_t, kMaxMemoryNodes> counts;
  for (int n = 0; n < num_teams_; ++n) {
    const Team& team = teams_[n];
    ranges.begins[n] = num_tasks * team.first_thread / threads_;
    counts[n] = num_tasks * (team.first_thread + team.threads) / threads_ - ranges.begins[n];
  }
  ParallelForNodes(
      std::span(counts.data(), num_teams_), WhenDone::kHelp,
      [](void* context, int node, int64_t i, int thread) {
        const Ranges& ranges = *static_cast<Ranges*>(context);
        ranges.task(ranges.context, ranges.begins[node] + i, thread);
      },
      &ranges);
}

void PinnedPool::ParallelForNodes(std::span<const int64_t> tasks, WhenDone when_done, NodeTask task,
                                  void* context) {
  if (std::ssize(tasks) != num_teams_) {
    ThreadPool::ParallelForNodes(tasks, when_done, task, context);
    return;
  }
  const int64_t total = std::accumulate(tasks.begin(), tasks.end(), int64_t{0});
  if (total <= 0) return;
  fork_guard_.ThrowIfForked(kSubject);
  const BusyScope busy(busy_);
  const DefaultFloatEnvironment environment;
  if (threads_ == 1 || (total == 1 && when_done == WhenDone::kHelp)) {
    for (int node = 0; node < num_teams_; ++node) {
      for (int64_t i = 0; i < tasks[node]; ++i) task(context, node, i, 0);
    }
    return;
  }
  StartJob(tasks, {task, context, when_done});
  RunTasks(0, 0);
  JoinWorkers();
  if (failed_.load(std::memory_order_relaxed)) {
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void PinnedPool::StartJob(std::span<const int64_t> tasks, const Job& job) {
  job_ = job;
  uint32_t running = 0;
  for (int n = 0; n < num_teams_; ++n) {
    Team& team = teams_[n];
    const int callers = n == 0 ? 1 : 0;  // the caller does tasks of the first team
    team.next.store(0, std::memory_order_relaxed);
    team.end = tasks[n];
    team.wanted = static_cast<uint32_t>(
        std::max<int64_t>(std::min<int64_t>(team.threads, tasks[n]) - callers, 0));
    running += team.wanted != 0 ? 1 : 0;
  }
  running_.store(running, std::memory_order_relaxed);
  // A worker that joins sees all that was written before, that of other teams as well.
  for (Team& team : teams()) {
    if (team.wanted == 0) continue;
    team.state.store(team.wanted * kOneWanted);
    WakeWorkers(team);
  }
}

void PinnedPool::RunTasks(int team, int thread) {
  const Job job = job_;
  try {
    for (int node = team; node >= 0;
         node = job.when_done == WhenDone::kHelp ? TeamWithMostLeft() : -1) {
      std::atomic<int64_t>& next = teams_[node].next;
      const int64_t end = teams_[node].end;
      for (;;) {
        const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task >= end) break;
        job.task(job.context, node, task, thread);
      }
    }
  } catch (...) {
    for (Team& each : teams()) each.next.store(each.end, std::memory_order_relaxed);
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

// Returns -1 if no team has tasks left.
int PinnedPool::TeamWithMostLeft() const {
  int best = -1;
  int64_t most = 0;
  for (int n = 0; n < num_teams_; ++n) {
    const int64_t left = teams_[n].end - teams_[n].next.load(std::memory_order_relaxed);
    if (left <= most) continue;
    most = left;
    best = n;
  }
  return best;
}

// A wake-up costs the thread that wakes a microsecond or more. Therefore the caller wakes two
// workers of a team, and each of them wakes two more before it works. Sequential consistency pairs
// this function with AwaitJob: either the caller sees the parked worker, or the worker sees the
// job.
void PinnedPool::WakeWorkers(Team& team) {
  const uint32_t wanted = (team.state.load() & kWantedMask) / kOneWanted;
  if (wanted == 0 || team.parked.load() == 0) return;
  FutexWake(team.state, static_cast<int>(std::min(wanted, 2u)));
}

void PinnedPool::JoinWorkers() {
  constexpr std::chrono::microseconds kPause{50};
  uint32_t unused = 0;  // teams of which no worker has joined
  for (Team& team : teams()) {
    if (team.wanted == 0) continue;
    if (job_.when_done == WhenDone::kWait) {
      caller_wait_.Wait([&] { return team.next.load(std::memory_order_relaxed) >= team.end; },
                        [&] {
                          fork_guard_.ThrowIfForked(kSubject);
                          std::this_thread::sleep_for(kPause);
                        });
    }
    const uint32_t before = team.state.fetch_and(~kWantedMask);
    if ((before & kWantedMask) != 0 && (before & kActiveMask) == 0) ++unused;
  }
  if (unused != 0) running_.fetch_sub(unused);
  caller_wait_.Wait([this] { return running_.load(std::memory_order_acquire) == 0; },
                    [this] {
                      fork_guard_.ThrowIfForked(kSubject);  // a task forked, and this is the child
                      caller_parked_.store(1);
                      if (running_.load() != 0) FutexWait(caller_parked_, 1);
                      caller_parked_.store(0, std::memory_order_relaxed);
                    });
}

void PinnedPool::WorkerMain(int team, int thread) {
  const DefaultFloatEnvironment environment;
  Team& mine = teams_[team];
  AdaptiveWait wait(spin_, crowded_);
  for (;;) {
    const bool parked = AwaitJob(mine, wait);
    if ((mine.state.load(std::memory_order_relaxed) & kStop) != 0) return;
    if (!EnterJob(mine)) continue;
    if (parked) WakeWorkers(mine);
    RunTasks(team, thread);
    LeaveJob(mine);
  }
}

// Returns whether the worker slept while it waited.
bool PinnedPool::AwaitJob(Team& team, AdaptiveWait& wait) {
  bool parked = false;
  wait.Wait(
      [&] { return (team.state.load(std::memory_order_relaxed) & (kWantedMask | kStop)) != 0; },
      [&] {
        parked = true;
        team.parked.fetch_add(1);
        const uint32_t state = team.state.load();
        if ((state & (kWantedMask | kStop)) == 0) FutexWait(team.state, state);
        team.parked.fetch_sub(1);
      });
  return parked;
}

bool PinnedPool::EnterJob(Team& team) {
  uint32_t state = team.state.load(std::memory_order_relaxed);
  while ((state & kWantedMask) != 0) {
    if (team.state.compare_exchange_weak(state, state - kOneWanted + kOneActive,
                                         std::memory_order_acquire, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

void PinnedPool::LeaveJob(Team& team) {
  // The job cannot end while this worker is active, so this clears `wanted` of no later job.
  if ((team.state.load(std::memory_order_relaxed) & kWantedMask) != 0) {
    team.state.fetch_and(~kWantedMask);
  }
  if ((team.state.fetch_sub(kOneActive) & kActiveMask) != kOneActive) return;
  if (running_.fetch_sub(1) != 1 || caller_parked_.load() == 0) return;
  caller_parked_.store(0);
  FutexWake(caller_parked_, 1);
}

}  // namespace cpumoe
