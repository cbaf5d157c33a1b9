// Times phases of thread pools whose tasks do nothing: what waking, handing out tasks and joining
// take.
//
//   pool_bench 2 8 96,96      pools of one node with 2 and 8 threads, and of two nodes with 96 each
//
// A machine with fewer CPUs than threads shows how a pool behaves when threads wait for CPUs. It
// does not show what a phase takes on a machine that has the CPUs (ARCHITECTURE.md, "Threads and
// NUMA nodes").
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "threading/pinned_pool.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

std::vector<NodeThreads> Nodes(const std::string& text) {
  std::vector<NodeThreads> nodes;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    nodes.push_back({.memory = {.threads = std::stoi(part)}, .cpus = ProcessAffinity()});
  }
  return nodes;
}

// Median nanoseconds of a phase with `per_thread` tasks for each thread.
double Median(PinnedPool& pool, const std::vector<NodeThreads>& nodes, int64_t per_thread) {
  constexpr int kPhases = 400;
  std::vector<int64_t> tasks;
  for (const NodeThreads& node : nodes) tasks.push_back(per_thread * node.memory.threads);
  std::vector<double> times;
  for (int i = 0; i < kPhases; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.ForNodes(tasks, [](int, int64_t, int) {});
    times.push_back(
        std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + kPhases / 2, times.end());
  return times[kPhases / 2];
}

}  // namespace
}  // namespace cpumoe

int main(int argc, char** argv) {
  using namespace cpumoe;  // NOLINT(google-build-using-namespace)
  std::cout << "threads  us per phase with 1 task per thread  with 8\n" << std::fixed;
  for (int i = 1; i < argc; ++i) {
    const std::vector<NodeThreads> nodes = Nodes(argv[i]);
    PinnedPool pool({.nodes = nodes});
    std::cout << std::setw(7) << argv[i] << std::setprecision(1);
    for (const int64_t per_thread : {1, 8}) {
      std::cout << std::setw(12) << Median(pool, nodes, per_thread) / 1000;
    }
    std::cout << std::endl;
  }
}
