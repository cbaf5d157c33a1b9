#include "threading/executor.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "threading/adaptive_wait.h"
#include "threading/futex.h"

namespace cpumoe {
namespace {

using Clock = AdaptiveWait::Clock;

constexpr std::chrono::microseconds kSpin{30};
constexpr char kSubject[] = "executor";

thread_local const void* driven_queue = nullptr;  // the queue that this thread drives

bool Crowded() {
  static const bool crowded = ProcessAffinity().size() < 2;
  return crowded;
}

Clock::time_point DeadlineAfter(std::chrono::nanoseconds timeout) {
  const Clock::time_point now = Clock::now();
  return timeout < Clock::time_point::max() - now ? now + timeout : Clock::time_point::max();
}

}  // namespace

struct Executor::Entry {
  std::function<void()> job;  // one of the two
  std::function<bool()> step;
  std::shared_ptr<Completion> completion = nullptr;

  // Returns whether there are more steps.
  bool Run() {
    if (step) return step();
    job();
    return false;
  }
};

struct Executor::Queue {
  static constexpr uint32_t kStop = 1u << 31;

  std::mutex mutex;  // guards the entries, started, driver
  std::deque<Entry> entries;
  std::deque<Entry> in_steps;
  bool started = false;
  pthread_t driver{};
  // Entries announced to the driver, plus kStop. The driver parks on this word.
  std::atomic<uint32_t> signal{0};
  std::atomic<uint32_t> driver_parked{0};

  void Announce(uint32_t what) {
    signal.fetch_add(what);
    if (driver_parked.load() != 0) FutexWake(signal, 1);
  }

  Entry Pop() {
    const std::lock_guard lock(mutex);
    std::deque<Entry>& from = entries.empty() ? in_steps : entries;
    Entry entry = std::move(from.front());
    from.pop_front();
    signal.fetch_sub(1);
    return entry;
  }

  // Puts a job back whose next step is due.
  void Return(Entry& entry) {
    const std::lock_guard lock(mutex);
    in_steps.push_front(std::move(entry));
    signal.fetch_add(1);
  }
};

void Completion::Finish(std::exception_ptr error) {
  error_ = std::move(error);
  done_.store(1);
  if (waiters_.load() != 0) FutexWake(done_, std::numeric_limits<int>::max());
}

void Completion::Wait() {
  WaitFor(std::chrono::nanoseconds::max());
  if (error_) std::rethrow_exception(error_);
}

bool Completion::WaitFor(std::chrono::nanoseconds timeout) {
  if (Done()) return true;
  fork_guard_.ThrowIfForked(kSubject);
  if (driven_queue == queue_) {
    throw std::logic_error(
        "executor: a job waits for a job that its own driver thread has yet to run; wait from "
        "another thread");
  }
  if (timeout <= std::chrono::nanoseconds::zero()) return false;
  const Clock::time_point deadline = DeadlineAfter(timeout);
  AdaptiveWait wait(std::min<std::chrono::nanoseconds>(kSpin, timeout), Crowded());
  bool expired = false;
  wait.Wait([&] { return expired || Done(); },
            [&] {
              const bool forever = deadline == Clock::time_point::max();
              const std::chrono::nanoseconds left =
                  forever ? std::chrono::nanoseconds::max() : deadline - Clock::now();
              expired = left <= std::chrono::nanoseconds::zero();
              if (expired) return;
              waiters_.fetch_add(1);
              FutexWait(done_, 0, left);
              waiters_.fetch_sub(1);
            });
  return Done();
}

Executor::Executor(std::vector<int> cpus)
    : cpus_(std::move(cpus)), queue_(std::make_shared<Queue>()) {}

Executor::~Executor() {
  if (fork_guard_.forked()) {
    // A thread of the parent may have been changing the queue at the fork, so the child must not
    // destroy the queue.
    new (std::nothrow) std::shared_ptr<Queue>(std::move(queue_));
    return;
  }
  if (!queue_->started) return;
  queue_->Announce(Queue::kStop);
  if (IsDriver()) {
    pthread_detach(queue_->driver);
  } else {
    pthread_join(queue_->driver, nullptr);
  }
}

std::shared_ptr<Completion> Executor::Submit(std::function<void()> job) {
  return Enqueue({.job = std::move(job), .step = nullptr});
}

std::shared_ptr<Completion> Executor::SubmitSteps(std::function<bool()> step) {
  return Enqueue({.job = nullptr, .step = std::move(step)});
}

std::shared_ptr<Completion> Executor::Enqueue(Entry entry) {
  fork_guard_.ThrowIfForked(kSubject);
  std::shared_ptr<Completion> completion(new Completion(queue_.get()));
  entry.completion = completion;
  {
    const std::lock_guard lock(queue_->mutex);
    if (!queue_->started) {
      queue_->driver = StartThread("cpumoe-exec", [queue = queue_] { Drive(*queue); });
      queue_->started = true;
      if (!SetAffinity(queue_->driver, cpus_)) SetAffinity(queue_->driver, makers_cpus_);
    }
    (entry.step ? queue_->in_steps : queue_->entries).push_back(std::move(entry));
  }
  queue_->Announce(1);
  return completion;
}

bool Executor::IsDriver() const { return driven_queue == queue_.get(); }

void Executor::Drive(Queue& queue) {
  driven_queue = &queue;
  AdaptiveWait wait(kSpin, Crowded());
  for (;;) {
    wait.Wait([&] { return queue.signal.load(std::memory_order_relaxed) != 0; },
              [&] {
                queue.driver_parked.store(1);
                FutexWait(queue.signal, 0);
                queue.driver_parked.store(0, std::memory_order_relaxed);
              });
    if (queue.signal.load() == Queue::kStop) return;
    Entry entry = queue.Pop();
    std::exception_ptr error;
    try {
      if (entry.Run()) {
        queue.Return(entry);
        continue;
      }
    } catch (...) {
      error = std::current_exception();
    }
    entry.job = nullptr;
    entry.step = nullptr;
    entry.completion->Finish(std::move(error));
  }
}

}  // namespace cpumoe
