// Nodes, caches and memory of made-up machines.
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include "cpp/made_up_machine.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

constexpr int64_t kGib = int64_t{1} << 30;

struct Node {
  int id;
  std::string cpus;
  int64_t gib = 64;
  std::string distances = "";
};

struct ExpectedNode {
  int id;
  std::vector<int> cores;
  int64_t gib = 64;
  int memory_node = -1;  // -1: the node itself
};

struct Machine {
  std::string name;
  int cpus;          // numbered from 0
  int smt = 1;       // CPU c and c + cpus / smt share a core
  int sockets = 1;   // the first cores belong to the first
  int l3_cores = 0;  // successive cores that share an L3 cache; 0: the system does not say
  std::vector<Node> nodes;
  std::vector<int> affinity;
  std::string online = "";
  std::string memory_permitted = "";

  std::vector<ExpectedNode> expected;
  std::vector<int> others = {};
  int l3_groups = 0;
  int threads;
};

void PrintTo(const Machine& machine, std::ostream* out) { *out << machine.name; }

std::vector<int> Joined(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

const std::vector<Machine>& Machines() {
  static const std::vector<Machine> machines = {
      {.name = "Laptop",
       .cpus = 16,
       .smt = 2,
       .l3_cores = 8,
       .nodes = {{0, "0-15", 32, "10"}},
       .affinity = Range(0, 15),
       .expected = {{0, Range(0, 7), 32}},
       .l3_groups = 1,
       .threads = 8},
      {.name = "Zen4With12Ccx",
       .cpus = 192,
       .smt = 2,
       .l3_cores = 8,
       .nodes = {{0, "0-191", 768, "10"}},
       .affinity = Range(0, 191),
       .expected = {{0, Range(0, 95), 768}},
       .l3_groups = 12,
       .threads = 96},
      {.name = "SubNumaClusters4",
       .cpus = 64,
       .sockets = 2,
       .l3_cores = 32,
       .nodes = {{0, "0-7", 64, "10 12 12 12 21 21 21 21"},
                 {1, "8-15", 64, "12 10 12 12 21 21 21 21"},
                 {2, "16-23"},
                 {3, "24-31"},
                 {4, "32-39"},
                 {5, "40-47"},
                 {6, "48-55"},
                 {7, "56-63"}},
       .affinity = Range(0, 63),
       .expected = {{0, Range(0, 7)},
                    {1, Range(8, 15)},
                    {2, Range(16, 23)},
                    {3, Range(24, 31)},
                    {4, Range(32, 39)},
                    {5, Range(40, 47)},
                    {6, Range(48, 55)},
                    {7, Range(56, 63)}},
       .l3_groups = 2,
       .threads = 64},
      {.name = "TwoSocketsWithSmt",
       .cpus = 64,
       .smt = 2,
       .sockets = 2,
       .l3_cores = 16,
       .nodes = {{0, "0-15,32-47", 256, "10 21"}, {1, "16-31,48-63", 256, "21 10"}},
       .affinity = Range(0, 63),
       .expected = {{0, Range(0, 15), 256}, {1, Range(16, 31), 256}},
       .l3_groups = 2,
       .threads = 32},
      {.name = "Node0Missing",
       .cpus = 8,
       .nodes = {{1, "0-3", 64, "10 20"}, {8, "4-7", 64, "20 10"}},
       .affinity = Range(0, 7),
       .expected = {{1, Range(0, 3)}, {8, Range(4, 7)}},
       .threads = 8},
      {.name = "MemoryOnlyNode",
       .cpus = 8,
       .nodes = {{0, "0-3", 64, "10 21 14"}, {1, "4-7", 64, "21 10 24"}, {2, "", 512, "14 24 10"}},
       .affinity = Range(0, 7),
       .expected = {{0, Range(0, 3)}, {1, Range(4, 7)}},
       .others = {2},
       .threads = 8},
      {.name = "NodeWithoutMemoryUsesTheNearest",
       .cpus = 12,
       .nodes = {{0, "0-3", 64, "10 30 20"},
                 {3, "4-7", 0, "30 10 15"},
                 {5, "8-11", 64, "20 15 10"}},
       .affinity = Range(0, 11),
       .expected = {{0, Range(0, 3)}, {3, Range(4, 7), 0, 5}, {5, Range(8, 11)}},
       .threads = 12},
      {.name = "MemoryOfACpuset",
       .cpus = 8,
       .nodes = {{0, "0-3", 64, "10 21"}, {1, "4-7", 64, "21 10"}},
       .affinity = Range(0, 7),
       .memory_permitted = "1",
       .expected = {{0, Range(0, 3), 0, 1}, {1, Range(4, 7)}},
       .threads = 8},
      {.name = "CpusetOfHalfANode",
       .cpus = 16,
       .sockets = 2,
       .nodes = {{0, "0-7", 64, "10 21"}, {1, "8-15", 64, "21 10"}},
       .affinity = Range(12, 15),
       .memory_permitted = "0-1",
       .expected = {{1, Range(12, 15)}},
       .others = {0},
       .threads = 4},
      {.name = "OnePermittedCore",
       .cpus = 64,
       .smt = 2,
       .sockets = 2,
       .l3_cores = 4,
       .nodes = {{0, "0-15,32-47"}, {1, "16-31,48-63"}},
       .affinity = {17, 49},
       .expected = {{1, {17}}},
       .others = {0},
       .l3_groups = 1,
       .threads = 1},
      {.name = "Cores256",
       .cpus = 512,
       .smt = 2,
       .sockets = 2,
       .l3_cores = 16,
       .nodes = {{0, "0-127,256-383", 1024, "10 32"}, {1, "128-255,384-511", 1024, "32 10"}},
       .affinity = Range(0, 511),
       .expected = {{0, Range(0, 127), 1024}, {1, Range(128, 255), 1024}},
       .l3_groups = 16,
       .threads = 256},
      {.name = "OfflineCores",
       .cpus = 8,
       .nodes = {{0, "0-3"}, {1, "5,7"}},
       .affinity = Range(0, 7),
       .online = "0-3,5,7",
       .expected = {{0, Range(0, 3)}, {1, {5, 7}}},
       .threads = 6},
      {.name = "SecondThreadOfEachCore",
       .cpus = 8,
       .smt = 2,
       .nodes = {{0, "0-1,4-5"}, {1, "2-3,6-7"}},
       .affinity = Range(4, 7),
       .expected = {{0, {4, 5}}, {1, {6, 7}}},
       .threads = 4},
      {.name = "ContainerWithoutNodes",
       .cpus = 4,
       .nodes = {},
       .affinity = Range(0, 3),
       .expected = {{0, Range(0, 3), 0}},
       .threads = 4},
      {.name = "NodesWhoseMemoryIsUnknown",
       .cpus = 4,
       .nodes = {{0, "0-1", 0}, {1, "2-3", 0}},
       .affinity = Range(0, 3),
       .expected = {{0, {0, 1}, 0}, {1, {2, 3}, 0}},
       .threads = 4},
  };
  return machines;
}

class MachineTest : public TopologyTest, public testing::WithParamInterface<Machine> {
 protected:
  MachineTest() {
    const Machine& machine = GetParam();
    const int cores = machine.cpus / machine.smt;
    for (int cpu = 0; cpu < machine.cpus; ++cpu) {
      const int core = cpu % cores;
      AddCpu(cpu, WithSiblings(core, core), core * machine.sockets / cores);
      if (machine.l3_cores == 0) continue;
      const int first = core / machine.l3_cores * machine.l3_cores;
      AddCaches(cpu, WithSiblings(first, first + machine.l3_cores - 1));
    }
    for (const Node& node : machine.nodes) {
      AddNode(node.id, node.cpus, node.gib << 20, node.distances);
    }
    if (!machine.online.empty()) Write("/sys/devices/system/cpu/online", machine.online);
    if (!machine.memory_permitted.empty()) {
      Write("/proc/self/status", "Name:\tx\nMems_allowed:\t3\nMems_allowed_list:\t" +
                                     machine.memory_permitted + "\nThreads:\t1\n");
    }
  }

  // The list of CPUs of cores [first, last].
  static std::string WithSiblings(int first, int last) {
    const int cores = GetParam().cpus / GetParam().smt;
    std::string text;
    for (int i = 0; i < GetParam().smt; ++i) {
      text += (i == 0 ? "" : ",") + Text(i * cores + first) + "-" + Text(i * cores + last);
    }
    return text;
  }
};

INSTANTIATE_TEST_SUITE_P(Machines, MachineTest, testing::ValuesIn(Machines()),
                         [](const auto& info) { return info.param.name; });

TEST_P(MachineTest, HasTheseNodes) {
  const Machine& machine = GetParam();
  const Topology topology = Read(machine.affinity);
  ASSERT_EQ(topology.nodes.size(), machine.expected.size());
  std::vector<int> cores;
  for (size_t i = 0; i < topology.nodes.size(); ++i) {
    const NumaNode& node = topology.nodes[i];
    const ExpectedNode& expected = machine.expected[i];
    EXPECT_EQ(node.id, expected.id);
    EXPECT_EQ(node.cores, expected.cores) << "node " << node.id;
    EXPECT_EQ(node.memory_bytes, expected.gib * kGib) << "node " << node.id;
    EXPECT_EQ(node.memory_node, expected.memory_node < 0 ? node.id : expected.memory_node);
    cores = Joined(cores, node.cores);
  }
  EXPECT_EQ(topology.cores, cores);
  std::vector<int> others;
  for (const NumaNode& node : topology.other_nodes) {
    others.push_back(node.id);
    EXPECT_TRUE(node.cpus.empty() && node.cores.empty());
    EXPECT_GT(node.memory_bytes, 0);
  }
  EXPECT_EQ(others, machine.others);
  EXPECT_EQ(topology.l3_groups, machine.l3_groups);
  EXPECT_EQ(topology.default_threads, machine.threads);
}

TEST_P(MachineTest, PlacesEachCpu) {
  const Topology topology = Read(GetParam().affinity);
  for (const CpuLocation& location : topology.cpus) {
    const auto node = std::find_if(topology.nodes.begin(), topology.nodes.end(),
                                   [&](const NumaNode& n) { return n.id == location.node; });
    ASSERT_NE(node, topology.nodes.end());
    EXPECT_TRUE(std::count(node->cpus.begin(), node->cpus.end(), location.cpu) == 1);
    EXPECT_GE(location.l3, GetParam().l3_cores == 0 ? -1 : 0);
    EXPECT_LT(location.l3, topology.l3_groups == 0 ? 0 : topology.l3_groups);
  }
}

TEST_F(TopologyTest, MalformedMemoryAndCachesAreUnknown) {
  AddCpu(0, "0");
  AddNode(0, "0");
  Write("/sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: -7 kB");
  Write("/sys/devices/system/node/node0/distance", "ten");
  Write("/sys/devices/system/cpu/cpu0/cache/index0/level", "three");
  Write("/sys/devices/system/cpu/cpu0/cache/index1/level", "3");
  Write("/proc/self/status", "Mems_allowed_list:\tall\n");
  const Topology topology = Read({0});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].memory_bytes, 0);
  EXPECT_EQ(topology.nodes[0].memory_node, 0);
  EXPECT_EQ(topology.l3_groups, 0);
}

}  // namespace
}  // namespace cpumoe
