// Which CPUs this process may use, which cores and NUMA nodes they belong to, and how many threads
// are worth starting.
#pragma once

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
};

struct NumaNode {
  int id = 0;
  std::vector<int> cpus;  // the CPUs of Topology::cpus that belong to this node
};

struct Topology {
  std::vector<CpuLocation> cpus;  // logical CPUs of the affinity mask, ascending
  std::vector<int> cores;       // one CPU per physical core, node by node, in the order for pinning
  std::vector<NumaNode> nodes;  // nodes with a CPU in the mask, ascending
  double quota = 0;             // CPU time that the cgroups grant, in CPUs; infinity if unlimited
  int default_threads = 1;      // cores, capped by the quota (rounded down), at least 1
};

// Never throws because of what it reads. A missing or malformed file counts as no information (one
// thread per core, one NUMA node, no quota).
Topology ReadTopology(const TopologySource& source = {});

}  // namespace cpumoe
