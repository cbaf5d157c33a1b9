// Which CPUs this process may use, how they hang together, and how many threads are worth starting.
#pragma once

#include <string>
#include <vector>

namespace cpumoe {

// The CPUs that the calling thread may run on, ascending; empty where the kernel does not say.
std::vector<int> ProcessAffinity();

// Where the facts are read from. Tests point it at made-up trees.
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
};

struct NumaNode {
  int id = 0;
  std::vector<int> cpus;  // those of Topology::cpus that are its own
};

struct Topology {
  std::vector<CpuLocation> cpus;  // logical CPUs of the affinity mask, ascending
  std::vector<int> cores;         // one CPU per physical core, node by node: the order for pinning
  std::vector<NumaNode> nodes;    // those with a CPU in the mask, ascending
  double quota = 0;               // CPUs' worth of time that the cgroups grant; infinity: no limit
  int default_threads = 1;        // cores, capped by the quota (rounded down), at least 1
};

// Never throws on account of what it reads: a missing or malformed file counts as no information
// (one thread per core, one NUMA node, no quota).
Topology ReadTopology(const TopologySource& source = {});

}  // namespace cpumoe
