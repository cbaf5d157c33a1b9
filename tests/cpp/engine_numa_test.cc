// Layers on the NUMA nodes that this machine has: one on most, several on the emulated machine of
// tests/numa.sh.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <iostream>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cpp/engine_test_util.h"
#include "cpp/forked_child.h"
#include "dispatch/cpu_features.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

// A thread for each core, on the node whose memory it should use.
std::vector<NodeThreads> NodesOfThisMachine() {
  std::map<int, NodeThreads> nodes;
  for (const NumaNode& node : ReadTopology().nodes) {
    NodeThreads& threads = nodes[node.memory_node];
    if (threads.cpus.empty()) threads.memory = {.id = node.memory_node, .threads = 0};
    threads.memory.threads += static_cast<int>(node.cores.size());
    threads.cpus.insert(threads.cpus.end(), node.cpus.begin(), node.cpus.end());
  }
  std::vector<NodeThreads> all;
  for (auto& [id, threads] : nodes) all.push_back(std::move(threads));
  return all;
}

// A layer of several huge pages per node.
const LayerSpec kLayer = {.experts = 16, .hidden = 1024, .intermediate = 1024};

struct DividedLayer {
  std::shared_ptr<Runtime> runtime =
      Runtime::Create({.node = {.nodes = NodesOfThisMachine()}, .callers_compute = false});
  TestLayer weights{"mxfp4", kLayer};
  std::shared_ptr<Layer> layer;

  DividedLayer() {
    MoeConfig config = weights.config();
    config.nodes = runtime->nodes();
    layer = Layer::Create(UsableIsas(DetectFeatures()).back(), "test", "mxfp4", config);
    std::vector<ExpertSource> sources;
    for (int64_t e = 0; e < kLayer.experts; ++e) sources.push_back(weights.Source(e));
    layer->Pack(*runtime, 0, sources);
  }
};

// Returns the least share of pages of a node that lie on it; 1 if the system does not say.
double LeastLocalShare(const Layer& layer) {
  double least = 1;
  for (const Placement& placement : layer.placement()) {
    if (placement.pages == 0) continue;
    least = std::min(least, static_cast<double>(placement.local) / placement.pages);
  }
  return least;
}

TEST(RealNodes, PagesLieOnTheirNodesAfterPackingAndCalls) {
  const DividedLayer divided;
  for (const Placement& placement : divided.layer->placement()) {
    std::cout << "node " << placement.share.node << ": " << (placement.share.bytes >> 20)
              << " MiB, " << placement.local << " of " << placement.pages << " pages local, "
              << (placement.share.bound ? "bound" : "not bound") << '\n';
  }
  EXPECT_GE(LeastLocalShare(*divided.layer), 0.99);
}

TEST(RealNodes, ResultsAreThoseOfOneNode) {
  for (const int64_t tokens : {1, 40}) {
    EngineCase whole({.tokens = tokens}, kLayer);
    const DividedLayer divided;
    for (int run = 0; run < 3; ++run) {
      std::vector<std::byte> output = whole.Output();
      Call(divided.runtime, divided.layer, whole.Options()).Execute(whole.Tensors(output));
      EXPECT_EQ(output, whole.expected());
    }
    EXPECT_GE(LeastLocalShare(*divided.layer), 0.99);
  }
}

// Answers EPERM to mbind, as a container's filter does. The threads that write pages first then
// decide where the pages lie.
bool RefuseBinding() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mbind, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(RealNodes, FirstTouchPlacesPagesWhereBindingIsRefused) {
  const int result = ResultInChild([] {
    if (!RefuseBinding()) return 7;
    const DividedLayer divided;
    for (const Placement& placement : divided.layer->placement()) {
      if (placement.share.bound) return 2;
    }
    return LeastLocalShare(*divided.layer) >= 0.99 ? 0 : 3;
  });
  if (result == 7) GTEST_SKIP() << "the system has no filters for system calls";
  EXPECT_EQ(result, 0);
}

}  // namespace
}  // namespace cpumoe
