#include "threading/executor.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpp/forked_child.h"
#include "threading/os_thread.h"
#include "threading/pinned_pool.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// Holds a job until Open().
class Gate {
 public:
  void Open() { open_ = true; }
  void Pass() const {
    while (!open_) std::this_thread::sleep_for(milliseconds(1));
  }

 private:
  std::atomic<bool> open_{false};
};

TEST(Executor, RunsJobsInOrderOnOneThread) {
  std::vector<int> order;
  std::vector<std::thread::id> threads;
  Executor executor;
  std::shared_ptr<Completion> last;
  for (int i = 0; i < 1000; ++i) {
    last = executor.Submit([&, i] {
      order.push_back(i);
      threads.push_back(std::this_thread::get_id());
    });
  }
  last->Wait();
  std::vector<int> expected(1000);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order, expected);
  EXPECT_EQ(std::count(threads.begin(), threads.end(), threads[0]), 1000);
  EXPECT_NE(threads[0], std::this_thread::get_id());
}

TEST(Executor, StepsGiveWayToJobsAndFollowOneAnother) {
  Executor executor;
  std::string order;
  int left = 3;
  std::shared_ptr<Completion> job, second;
  const auto first = executor.SubmitSteps([&] {
    order += 'a';
    if (left == 3) {
      second = executor.SubmitSteps([&] {
        order += 'b';
        return order.size() < 6;
      });
      job = executor.Submit([&] { order += 'j'; });
    }
    return --left > 0;
  });
  first->Wait();
  EXPECT_TRUE(job->Done());
  second->Wait();
  EXPECT_EQ(order, "ajaabb");
}

TEST(Executor, AStepThatThrowsEndsItsJob) {
  Executor executor;
  int steps = 0;
  const auto failed = executor.SubmitSteps([&]() -> bool {
    if (++steps == 2) throw std::runtime_error("step 2");
    return true;
  });
  EXPECT_THROW(failed->Wait(), std::runtime_error);
  EXPECT_EQ(steps, 2);
  executor.SubmitSteps([&] { return ++steps < 5; })->Wait();
  EXPECT_EQ(steps, 5);
}

TEST(Executor, DestructorRunsAllSteps) {
  int steps = 0;
  {
    Executor executor;
    executor.SubmitSteps([&] { return ++steps < 100; });
  }
  EXPECT_EQ(steps, 100);
}

TEST(Executor, SubmitAndWaitInTurn) {
  Executor executor;
  int64_t sum = 0;
  for (int i = 0; i < 2000; ++i) {
    const auto completion = executor.Submit([&, i] { sum += i; });
    completion->Wait();
    EXPECT_TRUE(completion->Done());
  }
  EXPECT_EQ(sum, 2000 * 1999 / 2);
}

TEST(Executor, WakesAParkedDriverAndAParkedWaiter) {
  Executor executor;
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(milliseconds(1));
    executor.Submit([] { std::this_thread::sleep_for(milliseconds(1)); })->Wait();
  }
}

TEST(Executor, WaitRethrowsEachTimeAndLaterJobsRun) {
  Executor executor;
  const auto failed = executor.Submit([] { throw std::out_of_range("job"); });
  bool ran = false;
  executor.Submit([&] { ran = true; })->Wait();
  EXPECT_TRUE(ran);
  EXPECT_TRUE(failed->Done());
  EXPECT_TRUE(failed->WaitFor(nanoseconds::zero()));
  EXPECT_THROW(failed->Wait(), std::out_of_range);
  EXPECT_THROW(failed->Wait(), std::out_of_range);
}

TEST(Executor, AnEmptyFunctionFailsAsAJobNotAsAThread) {
  Executor executor;
  EXPECT_THROW(executor.Submit(nullptr)->Wait(), std::bad_function_call);
}

TEST(Executor, WaitForTellsWhetherTheJobIsDone) {
  Executor executor;
  Gate gate;
  const auto completion = executor.Submit([&] { gate.Pass(); });
  EXPECT_FALSE(completion->Done());
  EXPECT_FALSE(completion->WaitFor(nanoseconds(-1)));
  EXPECT_FALSE(completion->WaitFor(nanoseconds::zero()));
  EXPECT_FALSE(completion->WaitFor(nanoseconds(1)));
  EXPECT_FALSE(completion->WaitFor(milliseconds(5)));
  gate.Open();
  EXPECT_TRUE(completion->WaitFor(std::chrono::hours(24 * 365 * 200)));
  EXPECT_TRUE(completion->WaitFor(nanoseconds::zero()));
}

TEST(Executor, ManyThreadsWaitForOneJob) {
  Executor executor;
  Gate gate;
  const auto completion = executor.Submit([&] { gate.Pass(); });
  std::atomic<int> woken{0};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 6; ++i) {
    waiters.emplace_back([&] {
      completion->Wait();
      ++woken;
    });
  }
  std::this_thread::sleep_for(milliseconds(5));
  EXPECT_EQ(woken, 0);
  gate.Open();
  for (auto& waiter : waiters) waiter.join();
  EXPECT_EQ(woken, 6);
}

TEST(Executor, ManyThreadsSubmit) {
  Executor executor;
  int64_t sum = 0;  // only the driver touches it
  std::vector<std::thread> submitters;
  for (int i = 0; i < 4; ++i) {
    submitters.emplace_back([&] {
      for (int job = 0; job < 200; ++job) executor.Submit([&] { ++sum; })->Wait();
    });
  }
  for (auto& submitter : submitters) submitter.join();
  EXPECT_EQ(sum, 800);
}

TEST(Executor, DestructorRunsTheQueueAndWhatItsJobsAdd) {
  int ran = 0;
  std::vector<std::shared_ptr<Completion>> completions;
  std::shared_ptr<Completion> added;
  {
    Gate gate;
    Executor executor;
    executor.Submit([&] { gate.Pass(); });
    for (int i = 0; i < 100; ++i) completions.push_back(executor.Submit([&] { ++ran; }));
    executor.Submit([&] { added = executor.Submit([&] { ++ran; }); });
    gate.Open();
  }
  EXPECT_EQ(ran, 101);
  EXPECT_TRUE(added->Done());
  for (const auto& completion : completions) EXPECT_TRUE(completion->Done());
}

// A host's thread that OpenMP has bound to one CPU may be the first to submit.
TEST(Executor, TheDriverHasTheAffinityOfTheThreadThatMadeTheExecutor) {
  const std::vector<int> cpus = ProcessAffinity();
  Executor executor;
  std::vector<int> seen;
  bool bound = false;
  std::thread([&] {
    bound = SetAffinity(pthread_self(), {cpus.front()});
    executor.Submit([&] { seen = ProcessAffinity(); })->Wait();
  }).join();
  if (!bound) GTEST_SKIP() << "the system does not let threads choose their CPU";
  EXPECT_EQ(seen, cpus);
}

TEST(Executor, TheDriverRunsOnTheCpusThatTheExecutorNames) {
  const std::vector<int> cpus = ProcessAffinity();
  for (const std::vector<int>& named : {std::vector{cpus.back()}, cpus}) {
    Executor executor(named);
    std::vector<int> seen;
    executor.Submit([&] { seen = ProcessAffinity(); })->Wait();
    EXPECT_EQ(seen, named);
  }
}

TEST(Executor, WhereTheSystemRefusesACpuTheDriverRunsAnyway) {
  for (const int cpu : {-1, kMaxCpus - 1, kMaxCpus, std::numeric_limits<int>::max()}) {
    Executor executor({cpu});
    std::vector<int> seen;
    std::thread([&] {
      SetAffinity(pthread_self(), {ProcessAffinity().front()});
      executor.Submit([&] { seen = ProcessAffinity(); })->Wait();
    }).join();
    EXPECT_EQ(seen, ProcessAffinity()) << cpu;
  }
}

TEST(Executor, DestructorWithoutJobs) {
  for (int i = 0; i < 10; ++i) Executor();
}

TEST(Executor, CapturesAreDestroyedBeforeTheJobIsDone) {
  Executor executor;
  for (int i = 0; i < 100; ++i) {
    auto held = std::make_shared<int>(1);
    const std::weak_ptr<int> watch = held;
    executor.Submit([held = std::move(held)] {})->Wait();
    EXPECT_TRUE(watch.expired());
  }
}

TEST(Executor, WaitingOnTheDriverThreadIsAnErrorUnlessDone) {
  Executor executor;
  const auto first = executor.Submit([] {});
  Gate gate;
  std::shared_ptr<Completion> later;
  const auto waits = executor.Submit([&] {
    gate.Pass();
    first->Wait();
    later->Wait();
  });
  later = executor.Submit([] {});
  gate.Open();
  EXPECT_THROW(waits->Wait(), std::logic_error);
  EXPECT_NO_THROW(later->Wait());
}

TEST(Executor, AJobMayOwnItsExecutor) {
  auto executor = std::make_shared<Executor>();
  Gate gate;
  std::atomic<bool> ran{false};
  const auto owner = executor->Submit([&gate, executor] { gate.Pass(); });
  const auto after = executor->Submit([&] { ran = true; });
  executor.reset();
  gate.Open();
  owner->Wait();
  after->Wait();
  EXPECT_TRUE(ran);
}

TEST(Executor, DrivesAPoolAndPassesItsExceptionsOn) {
  PinnedPool pool({.threads = 2});
  Executor executor;
  std::atomic<int> done{0};
  executor.Submit([&] { pool.For(10, [&](int64_t, int) { ++done; }); })->Wait();
  EXPECT_EQ(done, 10);
  const auto failed =
      executor.Submit([&] { pool.For(10, [](int64_t, int) { throw std::range_error("x"); }); });
  EXPECT_THROW(failed->Wait(), std::range_error);
}

TEST(Executor, DriverBlocksSignalsAndHasAName) {
  Executor executor;
  sigset_t mask;
  char name[16] = {};
  executor
      .Submit([&] {
        pthread_sigmask(SIG_BLOCK, nullptr, &mask);
        pthread_getname_np(pthread_self(), name, sizeof name);
      })
      ->Wait();
  EXPECT_EQ(sigismember(&mask, SIGINT), 1);
  EXPECT_EQ(sigismember(&mask, SIGSEGV), 0);
  EXPECT_STREQ(name, "cpumoe-exec");
}

TEST(Executor, IdleExecutorAndParkedWaiterUseNoCpu) {
  Executor executor;
  executor.Submit([] {})->Wait();
  const auto slow = executor.Submit([] { std::this_thread::sleep_for(milliseconds(300)); });
  const std::clock_t before = std::clock();
  slow->Wait();
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_LT(static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC, 0.1);
}

// Returns which check failed in a forked child, or 0 if none did.
int CheckInChild(std::unique_ptr<Executor> executor, Completion& done, Completion& pending) {
  const auto throws_clearly = [](auto call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      return std::string(error.what()).find("create a new Runtime") != std::string::npos;
    }
    return false;
  };
  if (!throws_clearly([&] { executor->Submit([] {}); })) return 1;
  if (!throws_clearly([&] { pending.Wait(); })) return 2;
  if (!throws_clearly([&] { pending.WaitFor(milliseconds(1)); })) return 3;
  if (pending.Done()) return 4;
  done.Wait();
  executor.reset();
  return 0;
}

TEST(Executor, ForkedChildGetsErrorsAndExits) {
  auto executor = std::make_unique<Executor>();
  Gate gate;
  const auto done = executor->Submit([] {});
  done->Wait();
  const auto pending = executor->Submit([&] { gate.Pass(); });
  const int result =
      ResultInChild([&] { return CheckInChild(std::move(executor), *done, *pending); });
  EXPECT_EQ(result, 0);
  gate.Open();
  pending->Wait();
}

}  // namespace
}  // namespace cpumoe
