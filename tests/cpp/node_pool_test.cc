// Pools whose threads are divided among nodes. The nodes are made up: a test's threads may run on
// any CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <ostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "threading/pinned_pool.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using WhenDone = ThreadPool::WhenDone;

std::vector<NodeThreads> Nodes(const std::vector<int>& threads) {
  std::vector<NodeThreads> nodes;
  for (size_t i = 0; i < threads.size(); ++i) {
    nodes.push_back(
        {.memory = {.id = static_cast<int>(i), .threads = threads[i]}, .cpus = ProcessAffinity()});
  }
  return nodes;
}

struct PoolShape {
  std::vector<int> threads;  // of each node
  int64_t spin_us = 50;
};

void PrintTo(const PoolShape& shape, std::ostream* out) {
  for (const int threads : shape.threads) *out << threads << '_';
  *out << "Spin" << shape.spin_us;
}

class NodePoolTest : public testing::TestWithParam<PoolShape> {
 protected:
  size_t num_nodes() const { return GetParam().threads.size(); }
  // The node of a thread of the pool.
  int NodeOf(int thread) const {
    int node = 0;
    for (; thread >= GetParam().threads[node]; ++node) thread -= GetParam().threads[node];
    return node;
  }

  PinnedPool pool_{{.nodes = Nodes(GetParam().threads), .spin = microseconds(GetParam().spin_us)}};
};

INSTANTIATE_TEST_SUITE_P(Shapes, NodePoolTest,
                         testing::Values(PoolShape{{1}}, PoolShape{{1, 1}}, PoolShape{{1, 1}, 0},
                                         PoolShape{{2, 1}}, PoolShape{{1, 3, 2}},
                                         PoolShape{{1, 3, 2}, 0}, PoolShape{{1, 1, 1, 1}}),
                         testing::PrintToStringParamName());

TEST_P(NodePoolTest, HasTheseThreadsAndNodes) {
  EXPECT_EQ(pool_.num_nodes(), static_cast<int>(num_nodes()));
  const std::vector<int>& threads = GetParam().threads;
  EXPECT_EQ(pool_.num_threads(), std::accumulate(threads.begin(), threads.end(), 0));
  EXPECT_EQ(pool_.num_pinned(), pool_.num_threads() - 1);
}

TEST_P(NodePoolTest, RunsEveryTaskOfANodeOnce) {
  const std::vector<std::vector<int64_t>> cases = {{0}, {1}, {7, 0, 1}, {0, 1}, {300}};
  for (const WhenDone when_done : {WhenDone::kHelp, WhenDone::kWait}) {
    for (const std::vector<int64_t>& few : cases) {
      std::vector<int64_t> tasks(num_nodes());
      for (size_t n = 0; n < tasks.size(); ++n) tasks[n] = few[n % few.size()];
      std::vector<std::vector<std::atomic<int>>> runs;
      for (const int64_t count : tasks) runs.emplace_back(static_cast<size_t>(count));
      std::atomic<int> bad{0};
      pool_.ForNodes(
          tasks,
          [&](int node, int64_t task, int thread) {
            ++runs[static_cast<size_t>(node)][static_cast<size_t>(task)];
            if (thread < 0 || thread >= pool_.num_threads()) ++bad;
            if (when_done == WhenDone::kWait && NodeOf(thread) != node) ++bad;
          },
          when_done);
      for (const auto& node : runs) {
        for (const auto& count : node) EXPECT_EQ(count, 1);
      }
      EXPECT_EQ(bad, 0);
    }
  }
}

TEST_P(NodePoolTest, RunsEveryTaskOfACallWithoutNodesOnce) {
  for (const int64_t num_tasks : {0, 1, 2, 3, 7, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(num_tasks));
    pool_.For(num_tasks, [&](int64_t task, int) { ++runs[static_cast<size_t>(task)]; });
    for (const auto& count : runs) EXPECT_EQ(count, 1) << num_tasks << " tasks";
  }
}

TEST_P(NodePoolTest, RunsTheTasksOfOtherNodes) {
  const std::vector<int64_t> tasks = {3, 0, 20, 1, 0};  // no pool here has five nodes
  std::vector<std::atomic<int>> runs(5);
  pool_.ForNodes(tasks, [&](int node, int64_t task, int) {
    EXPECT_LT(task, tasks[static_cast<size_t>(node)]);
    ++runs[static_cast<size_t>(node)];
  });
  for (size_t n = 0; n < 5; ++n) EXPECT_EQ(runs[n], tasks[n]);
}

TEST_P(NodePoolTest, SurvivesManySmallCalls) {
  constexpr int kCalls = 2000;
  int64_t plain_sum = 0;  // the join must make plain writes of the tasks visible
  const std::vector<int64_t> tasks(num_nodes(), 2);
  std::vector<int64_t> results(2 * num_nodes());
  for (int call = 0; call < kCalls; ++call) {
    pool_.ForNodes(tasks, [&](int node, int64_t task, int) {
      results[static_cast<size_t>(2 * node + task)] = call;
    });
    for (const int64_t result : results) plain_sum += result;
  }
  EXPECT_EQ(plain_sum, static_cast<int64_t>(results.size()) * kCalls * (kCalls - 1) / 2);
}

TEST_P(NodePoolTest, WakesParkedWorkersAfterPauses) {
  const std::vector<int64_t> tasks(num_nodes(), 10);
  for (int call = 0; call < 10; ++call) {
    std::this_thread::sleep_for(microseconds(100 * call));
    std::atomic<int> done{0};
    const WhenDone when_done = call % 2 == 0 ? WhenDone::kHelp : WhenDone::kWait;
    pool_.ForNodes(tasks, [&](int, int64_t, int) { ++done; }, when_done);
    EXPECT_EQ(done, 10 * pool_.num_nodes());
  }
}

TEST_P(NodePoolTest, RethrowsAndStaysUsable) {
  const std::vector<int64_t> tasks(num_nodes(), 1000);
  for (const WhenDone when_done : {WhenDone::kHelp, WhenDone::kWait}) {
    for (int round = 0; round < 10; ++round) {
      std::atomic<int> begun{0};
      const auto fail = [&](int, int64_t, int) {
        ++begun;
        throw std::out_of_range("task");
      };
      EXPECT_THROW(pool_.ForNodes(tasks, fail, when_done), std::out_of_range);
      EXPECT_LE(begun, pool_.num_threads());
      std::atomic<int> after{0};
      pool_.ForNodes(tasks, [&](int, int64_t, int) { ++after; }, when_done);
      EXPECT_EQ(after, 1000 * pool_.num_nodes());
    }
  }
}

TEST_P(NodePoolTest, RefusesNestedCalls) {
  const std::vector<int64_t> tasks(num_nodes(), 5);
  const auto nested = [&](int, int64_t, int) { pool_.For(2, [](int64_t, int) {}); };
  EXPECT_THROW(pool_.ForNodes(tasks, nested), std::logic_error);
}

// The tasks of node 0 sleep, so that threads of node 1 have time to help.
TEST(NodePool, ThreadsHelpTheNodeThatHasMostLeft) {
  PinnedPool pool({.nodes = Nodes({1, 1})});
  std::atomic<int> helped{0};
  pool.ForNodes(std::vector<int64_t>{100, 1}, [&](int node, int64_t, int thread) {
    std::this_thread::sleep_for(milliseconds(1));
    if (node == 0 && thread == 1) ++helped;
  });
  EXPECT_GT(helped, 0);
}

TEST(NodePool, ANodeWithoutTasksWakesNobody) {
  PinnedPool pool({.nodes = Nodes({2, 2})});
  std::atomic<int> others{0};
  pool.ForNodes(std::vector<int64_t>{100, 0}, [&](int, int64_t, int thread) {
    if (thread >= 2) ++others;
  });
  EXPECT_EQ(others, 0);
}

TEST(NodePool, ThreadsRunOnTheCpusOfTheirNode) {
  const std::vector<int> cpus = ProcessAffinity();
  std::vector<NodeThreads> nodes = Nodes({2, 2});
  nodes[1].cpus = {cpus.back()};
  for (const bool one_each : {false, true}) {
    for (NodeThreads& node : nodes) node.one_cpu_each = one_each;
    PinnedPool pool({.nodes = nodes});
    std::vector<std::vector<int>> masks(4);
    std::atomic<int> arrived{0};
    pool.ForNodes(std::vector<int64_t>{2, 2}, [&](int, int64_t, int thread) {
      ++arrived;
      while (arrived < 4) std::this_thread::yield();
      masks[static_cast<size_t>(thread)] = ProcessAffinity();
    });
    EXPECT_EQ(masks[0], cpus) << "the caller keeps its mask";
    EXPECT_EQ(masks[1], one_each ? std::vector<int>{cpus[1 % cpus.size()]} : cpus);
    EXPECT_EQ(masks[2], std::vector<int>{cpus.back()});
    EXPECT_EQ(masks[3], std::vector<int>{cpus.back()});
  }
}

// More threads than any test machine has cores. Plain writes show whether the join is complete.
TEST(NodePool, JoinsUpTo192Threads) {
  const std::vector<std::vector<int>> shapes = {{2}, {64}, {96, 96}, std::vector<int>(8, 24)};
  for (const std::vector<int>& threads : shapes) {
    PinnedPool pool({.nodes = Nodes(threads)});
    const std::vector<int64_t> tasks(threads.size(), 2 * threads[0]);
    std::vector<int> results(threads.size() * tasks[0]);
    for (int call = 1; call <= 20; ++call) {
      pool.ForNodes(tasks, [&](int node, int64_t task, int) {
        results[static_cast<size_t>(node * tasks[0] + task)] = call;
      });
      ASSERT_EQ(std::count(results.begin(), results.end(), call), std::ssize(results));
    }
  }
}

TEST(NodePool, RefusesBadNodes) {
  EXPECT_THROW(PinnedPool({.nodes = Nodes({1, 0})}), std::invalid_argument);
  EXPECT_THROW(PinnedPool({.nodes = Nodes(std::vector<int>(kMaxMemoryNodes + 1, 1))}),
               std::invalid_argument);
  EXPECT_THROW(PinnedPool({.nodes = Nodes({PinnedPool::kMaxThreads, 1})}), std::invalid_argument);
}

}  // namespace
}  // namespace cpumoe
