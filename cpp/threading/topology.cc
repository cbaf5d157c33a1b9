#include "threading/topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "threading/cgroup_quota.h"
#include "threading/os_thread.h"

namespace cpumoe {
namespace {

constexpr size_t kMaxThreadsPerCore = 16;
constexpr size_t kMaxFileBytes = 1 << 16;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxFileBytes, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(std::max<std::streamsize>(file.gcount(), 0)));
  return text;
}

// Parses a decimal number from 0 to kMaxCpus - 1. Returns -1 for any other text.
int ParseId(std::string_view text) {
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  return whole && value >= 0 && value < kMaxCpus ? value : -1;
}

std::string_view Trim(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

// Parses the Linux list format, "0-3,8,10-11". Malformed parts are skipped.
std::vector<int> ParseCpuList(std::string_view text) {
  std::set<int> cpus;
  for (text = Trim(text); !text.empty();) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view part = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    const size_t dash = part.find('-');
    const int first = ParseId(part.substr(0, dash));
    const int last = dash == std::string_view::npos ? first : ParseId(part.substr(dash + 1));
    if (first < 0) continue;
    for (int cpu = first; cpu <= last; ++cpu) cpus.insert(cpu);
  }
  return {cpus.begin(), cpus.end()};
}

std::vector<int> ReadCpuList(const std::string& path) { return ParseCpuList(ReadFile(path)); }

std::vector<int> UsableCpus(const TopologySource& source) {
  std::set<int> cpus;
  for (const int cpu : source.affinity) {
    if (cpu >= 0 && cpu < kMaxCpus) cpus.insert(cpu);
  }
  if (!cpus.empty()) return {cpus.begin(), cpus.end()};
  const std::vector<int> online = ReadCpuList(source.sysfs + "/devices/system/cpu/online");
  return online.empty() ? std::vector<int>{0} : online;
}

// The logical CPUs of one physical core. Linux before 5.2 has only the second file.
std::vector<int> CoreSiblings(const std::string& topology_directory) {
  for (const char* name : {"/core_cpus_list", "/thread_siblings_list"}) {
    std::vector<int> siblings = ReadCpuList(topology_directory + name);
    if (!siblings.empty() && siblings.size() <= kMaxThreadsPerCore) return siblings;
  }
  return {};
}

std::map<int, int> NodeOfCpu(const std::string& sysfs) {
  std::map<int, int> node_of_cpu;
  std::error_code error;
  std::filesystem::directory_iterator entry(sysfs + "/devices/system/node", error);
  while (!error && entry != std::filesystem::directory_iterator()) {
    const std::string name = entry->path().filename().string();
    const int node = name.rfind("node", 0) == 0 ? ParseId(std::string_view(name).substr(4)) : -1;
    if (node >= 0) {
      for (const int cpu : ReadCpuList(entry->path().string() + "/cpulist")) {
        node_of_cpu.emplace(cpu, node);
      }
    }
    entry.increment(error);
  }
  return node_of_cpu;
}

int IdInFile(const std::string& path) { return std::max(ParseId(Trim(ReadFile(path))), 0); }

// Locates each CPU. Here `core` is the lowest usable CPU of the physical core, not yet an index.
std::vector<CpuLocation> LocateCpus(const TopologySource& source) {
  const std::map<int, int> node_of_cpu = NodeOfCpu(source.sysfs);
  std::map<int, int> core_of_cpu;
  std::vector<CpuLocation> locations;
  for (const int cpu : UsableCpus(source)) {
    const std::string directory =
        source.sysfs + "/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology";
    if (core_of_cpu.emplace(cpu, cpu).second) {
      for (const int sibling : CoreSiblings(directory)) core_of_cpu.emplace(sibling, cpu);
    }
    const auto node = node_of_cpu.find(cpu);
    locations.push_back({.cpu = cpu,
                         .core = core_of_cpu.at(cpu),
                         .package = IdInFile(directory + "/physical_package_id"),
                         .node = node == node_of_cpu.end() ? 0 : node->second});
  }
  return locations;
}

}  // namespace

std::vector<int> ProcessAffinity() {
  // Linux refuses a mask that is smaller than its own, and does not say how large its own is.
  for (int size = 1024; size <= kMaxCpus; size *= 2) {
    cpu_set_t* const set = CPU_ALLOC(size);
    if (set == nullptr) return {};
    const size_t bytes = CPU_ALLOC_SIZE(size);
    CPU_ZERO_S(bytes, set);
    const int error = sched_getaffinity(0, bytes, set) == 0 ? 0 : errno;
    std::vector<int> cpus;
    for (int cpu = 0; error == 0 && cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (error != EINVAL) return cpus;
  }
  return {};
}

Topology ReadTopology(const TopologySource& source) {
  Topology topology;
  topology.cpus = LocateCpus(source);
  std::map<int, NumaNode> nodes;
  std::set<std::pair<int, int>> cores;  // (node, the core's lowest usable CPU)
  for (const CpuLocation& location : topology.cpus) {
    NumaNode& node = nodes[location.node];
    node.id = location.node;
    node.cpus.push_back(location.cpu);
    if (location.core == location.cpu) cores.emplace(location.node, location.cpu);
  }
  for (auto& [id, node] : nodes) topology.nodes.push_back(std::move(node));
  std::map<int, int> index_of_core;
  for (const auto& [node, cpu] : cores) {
    index_of_core.emplace(cpu, static_cast<int>(topology.cores.size()));
    topology.cores.push_back(cpu);
  }
  for (CpuLocation& location : topology.cpus) location.core = index_of_core.at(location.core);

  topology.quota = CgroupCpuQuota(source.sysfs, source.proc);
  topology.default_threads = static_cast<int>(topology.cores.size());
  if (topology.quota < topology.default_threads) {
    topology.default_threads = std::max(1, static_cast<int>(topology.quota));
  }
  return topology;
}

}  // namespace cpumoe
