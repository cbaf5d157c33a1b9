#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpp/forked_child.h"
#include "threading/os_thread.h"
#include "threading/pinned_pool.h"
#include "threading/thread_pool.h"
#include "threading/topology.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CPUMOE_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CPUMOE_SANITIZED 1
#endif
#endif

namespace cpumoe {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr microseconds kNoSpin{0};

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Runs body(thread) once on every thread of the pool at the same time.
template <class Body>
void OnEveryThread(ThreadPool& pool, Body body) {
  std::atomic<int> arrived{0};
  pool.For(pool.num_threads(), [&](int64_t, int thread) {
    ++arrived;
    while (arrived < pool.num_threads()) std::this_thread::yield();
    body(thread);
  });
}

int CpusInMask() { return static_cast<int>(ProcessAffinity().size()); }

struct PoolShape {
  int threads;
  int64_t spin_us;
};

class PinnedPoolTest : public testing::TestWithParam<PoolShape> {
 protected:
  PinnedPool pool_{{.threads = GetParam().threads, .spin = microseconds(GetParam().spin_us)}};
};

INSTANTIATE_TEST_SUITE_P(Shapes, PinnedPoolTest,
                         testing::Values(PoolShape{1, 50}, PoolShape{2, 50}, PoolShape{2, 0},
                                         PoolShape{3, 5}, PoolShape{8, 50}, PoolShape{8, 0}),
                         [](const auto& info) {
                           return std::to_string(info.param.threads) + "ThreadsSpin" +
                                  std::to_string(info.param.spin_us);
                         });

TEST_P(PinnedPoolTest, RunsEveryTaskOnce) {
  for (const int64_t num_tasks : {0, 1, 2, 3, 7, 8, 9, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(num_tasks));
    std::atomic<int> bad_threads{0};
    pool_.For(num_tasks, [&](int64_t task, int thread) {
      ++runs[static_cast<size_t>(task)];
      if (thread < 0 || thread >= pool_.num_threads()) ++bad_threads;
    });
    for (const auto& count : runs) EXPECT_EQ(count, 1) << num_tasks << " tasks";
    EXPECT_EQ(bad_threads, 0);
  }
}

TEST_P(PinnedPoolTest, SurvivesManySmallCalls) {
  constexpr int kCalls = 2000;
  int64_t plain_sum = 0;  // the join must make plain writes of the tasks visible
  std::vector<int64_t> results(3);
  for (int call = 0; call < kCalls; ++call) {
    pool_.For(3, [&](int64_t task, int) { results[static_cast<size_t>(task)] = call + task; });
    for (const int64_t result : results) plain_sum += result;
  }
  EXPECT_EQ(plain_sum, int64_t{3} * kCalls * (kCalls - 1) / 2 + int64_t{3} * kCalls);
}

TEST_P(PinnedPoolTest, WakesParkedWorkersAfterPauses) {
  for (int call = 0; call < 20; ++call) {
    std::this_thread::sleep_for(microseconds(50 * call));
    std::atomic<int> threads{0};
    OnEveryThread(pool_, [&](int) { ++threads; });
    EXPECT_EQ(threads, pool_.num_threads());
  }
}

TEST_P(PinnedPoolTest, HandsTasksOutInAscendingOrder) {
  std::vector<std::vector<int64_t>> seen(static_cast<size_t>(pool_.num_threads()));
  pool_.For(5000, [&](int64_t task, int thread) {
    seen[static_cast<size_t>(thread)].push_back(task);  // a race here means two threads share an id
  });
  for (const auto& tasks : seen) EXPECT_TRUE(std::is_sorted(tasks.begin(), tasks.end()));
}

TEST_P(PinnedPoolTest, FinishesUnevenTasks) {
  std::atomic<int64_t> done{0};
  pool_.For(40, [&](int64_t task, int) {
    if (task % 10 == 0) std::this_thread::sleep_for(milliseconds(5));
    done += task;
  });
  EXPECT_EQ(done, 40 * 39 / 2);
}

TEST_P(PinnedPoolTest, RethrowsDropsTheRestAndStaysUsable) {
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> begun{0};
    try {
      pool_.For(100'000, [&](int64_t task, int) {
        ++begun;
        throw std::out_of_range("task " + std::to_string(task));
      });
      FAIL() << "nothing thrown";
    } catch (const std::out_of_range& error) {
      EXPECT_EQ(std::string(error.what()).rfind("task ", 0), 0u) << error.what();
    }
    EXPECT_LE(begun, pool_.num_threads());  // a thread stops at its first exception
    std::atomic<int> after{0};
    pool_.For(50, [&](int64_t, int) { ++after; });
    EXPECT_EQ(after, 50);
  }
  EXPECT_THROW(pool_.For(1, [](int64_t, int) { throw 7; }), int);
}

TEST_P(PinnedPoolTest, RefusesNestedCallsOnEveryThread) {
  std::atomic<int> refused{0};
  const auto nested = [&](int) {
    try {
      pool_.For(2, [](int64_t, int) {});
    } catch (const std::logic_error&) {
      ++refused;
    }
  };
  OnEveryThread(pool_, nested);
  EXPECT_EQ(refused, pool_.num_threads());
  EXPECT_THROW(OnEveryThread(pool_, [&](int) { pool_.For(1, [](int64_t, int) {}); }),
               std::logic_error);
  EXPECT_NO_THROW(pool_.For(2, [](int64_t, int) {}));
}

TEST(PinnedPool, NoTasksIsANoOpEvenInsideATask) {
  PinnedPool pool({.threads = 2});
  pool.For(0, [](int64_t, int) { FAIL(); });
  pool.For(2, [&](int64_t, int) { pool.For(0, [](int64_t, int) { FAIL(); }); });
}

TEST(PinnedPool, RefusesASecondCaller) {
  PinnedPool pool({.threads = 2});
  pool.For(1, [&](int64_t, int) {
    std::thread([&] { EXPECT_THROW(pool.For(2, [](int64_t, int) {}), std::logic_error); }).join();
  });
}

TEST(PinnedPool, ServesSeveralCallersInTurn) {
  PinnedPool pool({.threads = 3});
  std::atomic<int> done{0};
  for (int i = 0; i < 10; ++i) {
    std::thread([&] { pool.For(20, [&](int64_t, int) { ++done; }); }).join();
  }
  EXPECT_EQ(done, 200);
}

TEST(PinnedPool, WorksInsideATaskOfAnotherPool) {
  PinnedPool outer({.threads = 2});
  PinnedPool inner({.threads = 2});
  std::atomic<int> done{0};
  outer.For(2, [&](int64_t task, int) {
    if (task == 0) inner.For(10, [&](int64_t, int) { ++done; });
  });
  EXPECT_EQ(done, 10);
}

TEST(PinnedPool, SeveralPoolsRunAtOnce) {
  std::atomic<int64_t> done{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      PinnedPool pool({.threads = 3});
      for (int call = 0; call < 200; ++call) pool.For(5, [&](int64_t, int) { ++done; });
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(done, 3 * 200 * 5);
}

TEST(PinnedPool, StartsAndStopsWithoutWork) {
  for (int i = 0; i < 50; ++i) PinnedPool({.threads = 1 + i % 5});
}

TEST(PinnedPool, RefusesBadThreadCounts) {
  for (const int threads : {-1, 0, PinnedPool::kMaxThreads + 1}) {
    EXPECT_THROW(PinnedPool({.threads = threads}), std::invalid_argument) << threads;
  }
}

TEST(PinnedPool, IdlePoolUsesNoCpu) {
  PinnedPool pool({.threads = 4});
  OnEveryThread(pool, [](int) {});
  std::this_thread::sleep_for(milliseconds(50));
  const double before = CpuSeconds();
  std::this_thread::sleep_for(milliseconds(300));
  EXPECT_LT(CpuSeconds() - before, 0.1) << "one polling worker would use 0.3 s";
}

TEST(PinnedPool, WorkersBlockSignalsButFaultsAndHaveNames) {
  PinnedPool pool({.threads = 3});
  std::vector<sigset_t> masks(3);
  std::vector<std::string> names(3);
  OnEveryThread(pool, [&](int thread) {
    const auto t = static_cast<size_t>(thread);
    pthread_sigmask(SIG_BLOCK, nullptr, &masks[t]);
    char name[16] = {};
    pthread_getname_np(pthread_self(), name, sizeof name);
    names[t] = name;
  });
  for (size_t t = 1; t < 3; ++t) {
    for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGALRM, SIGCHLD}) {
      EXPECT_EQ(sigismember(&masks[t], signal), 1) << signal;
    }
    for (const int signal : {SIGSEGV, SIGILL, SIGBUS, SIGFPE, SIGTRAP}) {
      EXPECT_EQ(sigismember(&masks[t], signal), 0) << signal;
    }
    EXPECT_EQ(names[t], "cpumoe-" + std::to_string(t));
  }
  EXPECT_EQ(sigismember(&masks[0], SIGINT), 0) << "the caller's own mask must not change";
}

TEST(PinnedPool, PinsWorkersButNeverTheCaller) {
  const std::vector<int> cpus = ProcessAffinity();
  ASSERT_FALSE(cpus.empty());
  PinnedPool pool({.threads = 3, .cpus = cpus});
  EXPECT_EQ(pool.num_pinned(), 2);
  std::vector<std::vector<int>> masks(3);
  OnEveryThread(pool, [&](int thread) { masks[static_cast<size_t>(thread)] = ProcessAffinity(); });
  EXPECT_EQ(masks[0], cpus);
  for (size_t t = 1; t < 3; ++t) {
    EXPECT_EQ(masks[t], std::vector<int>{cpus[t % cpus.size()]});
  }
}

TEST(PinnedPool, LeavesWorkersUnpinnedWhereTheKernelRefuses) {
  PinnedPool refused({.threads = 2, .cpus = {65535}});
  EXPECT_EQ(refused.num_pinned(), 0);
  for (const int cpu : {-1, 65536, std::numeric_limits<int>::max()}) {
    EXPECT_EQ(PinnedPool({.threads = 2, .cpus = {cpu}}).num_pinned(), 0) << cpu;
  }
  EXPECT_EQ(PinnedPool({.threads = 2}).num_pinned(), 0);
  std::vector<size_t> cpus(2);
  OnEveryThread(refused, [&](int t) { cpus[static_cast<size_t>(t)] = ProcessAffinity().size(); });
  EXPECT_EQ(cpus[1], static_cast<size_t>(CpusInMask()));
}

TEST(PinnedPool, ReportsHowManyThreadsItGot) {
#ifdef CPUMOE_SANITIZED
  GTEST_SKIP() << "a sanitizer's own allocations do not survive a limit on address space";
#endif
  // Runs in a child, so that no other allocation of this process meets the limit.
  const int result = ResultInChild([] {
    long pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit{};
    getrlimit(RLIMIT_AS, &limit);
    // Leaves room for a few stacks of 8 MiB.
    limit.rlim_cur = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (40l << 20));
    setrlimit(RLIMIT_AS, &limit);
    try {
      PinnedPool pool({.threads = 1000});
    } catch (const std::system_error& error) {
      const std::string text = error.what();
      if (text.find("wanted 1000 threads, got ") == std::string::npos) return 2;
      PinnedPool small({.threads = 2});  // the threads that had started gave their stacks back
      small.For(4, [](int64_t, int) {});
      return 0;
    }
    return 3;
  });
  EXPECT_EQ(result, 0);
}

TEST(PinnedPool, ForkedChildGetsAnErrorAndExits) {
  auto pool = std::make_unique<PinnedPool>(PinnedPool::Options{.threads = 3});
  const int result = ResultInChild([&] {
    for (const int64_t num_tasks : {1, 10}) {
      try {
        pool->For(num_tasks, [](int64_t, int) {});
        return 1;
      } catch (const std::runtime_error& error) {
        if (std::string(error.what()).find("create a new Runtime") == std::string::npos) return 2;
      }
    }
    pool.reset();
    return 0;
  });
  EXPECT_EQ(result, 0);
  std::atomic<int> done{0};
  pool->For(10, [&](int64_t, int) { ++done; });
  EXPECT_EQ(done, 10) << "the parent's pool goes on";
}

TEST(PinnedPool, ForkInsideATaskDoesNotHangTheChild) {
  PinnedPool pool({.threads = 2, .spin = kNoSpin});
  std::atomic<bool> worker_runs{false};
  std::atomic<bool> child_done{false};
  const pid_t parent = getpid();
  pid_t child = -1;
  const auto body = [&](int64_t, int thread) {
    if (thread == 0) {
      while (!worker_runs) std::this_thread::yield();
      child = fork();
      if (child != 0) {
        int status = 0;
        waitpid(child, &status, 0);
        EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        child_done = true;
      } else {
        alarm(60);
      }
    } else {
      worker_runs = true;
      while (!child_done) std::this_thread::yield();
    }
  };
  try {
    pool.For(2, body);
    if (getpid() != parent) _exit(1);
  } catch (const std::runtime_error&) {
    _exit(getpid() != parent ? 0 : 1);
  }
}

TEST(ForkGuard, KnowsTheForksSinceItsOwnBirthOnly) {
  const ForkGuard before;
  EXPECT_FALSE(before.forked());
  const int result =
      ResultInChild([&] { return before.forked() && !ForkGuard().forked() ? 0 : 1; });
  EXPECT_EQ(result, 0);
  EXPECT_FALSE(before.forked());
}

TEST(SerialPool, RunsInOrderOnTheCaller) {
  SerialPool pool;
  std::vector<int64_t> tasks;
  pool.For(5, [&](int64_t task, int thread) {
    EXPECT_EQ(thread, 0);
    tasks.push_back(task);
  });
  EXPECT_EQ(tasks, (std::vector<int64_t>{0, 1, 2, 3, 4}));
}

}  // namespace
}  // namespace cpumoe
