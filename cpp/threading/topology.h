// Which CPUs and memory this process may use, which cores, caches and NUMA nodes they belong to,
// and how many threads are worth starting.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cpumoe {

// The CPUs that the calling thread may run on, ascending. Empty if the operating system does not
// say.
std::vector<int> ProcessAffinity();

// The folders that facts are read from. Tests use made-up trees.
struct TopologySource {
  std::string sysfs = "/sys";
  std::string proc = "/proc";
  std::vector<int> affinity = ProcessAffinity();
};

struct CpuLocation {
  int cpu = 0;
  int core = 0;     // index into Topology::cores
  int package = 0;  // socket
  int node = 0;     // NUMA node
  // A number from 0 of the L3 cache that the CPU shares with others; -1: the system does not say.
  int l3 = -1;
};

// A NUMA node, by the number that the system gives it. Numbers may have gaps. A socket may have
// several nodes (sub-NUMA clusters).
struct NumaNode {
  int id = 0;
  std::vector<int> cpus;   // the CPUs of Topology::cpus that belong to this node
  std::vector<int> cores;  // those of Topology::cores, in its order
  // The node's memory. 0: it has none, this process may not use it, or the system does not say.
  int64_t memory_bytes = 0;
  // The node whose memory the threads of this node should use. It is the node itself, or, if the
  // node has no memory and others do, the nearest one of those.
  int memory_node = 0;
};

struct Topology {
  std::vector<CpuLocation> cpus;  // logical CPUs of the affinity mask, ascending
  std::vector<int> cores;       // one CPU per physical core, node by node, in the order for pinning
  std::vector<NumaNode> nodes;  // nodes with a CPU in the mask, ascending
  // Nodes without a CPU in the mask, ascending: memory alone (CXL, HBM), or CPUs of others.
  std::vector<NumaNode> other_nodes;
  int l3_groups = 0;        // L3 caches of the CPUs of the mask; 0: the system does not say
  double quota = 0;         // CPU time that the cgroups grant, in CPUs; infinity if unlimited
  int default_threads = 1;  // cores, capped by the quota (rounded down), at least 1
};

// Never throws because of what it reads. A missing or malformed file counts as no information (one
// thread per core, one NUMA node, no quota).
Topology ReadTopology(const TopologySource& source = {});

}  // namespace cpumoe
