#include "threading/topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string_view>
#include <system_error>
#include <utility>

#include "threading/cgroup_quota.h"
#include "threading/os_thread.h"

namespace cpumoe {
namespace {

constexpr size_t kMaxThreadsPerCore = 16;
constexpr size_t kMaxFileBytes = 1 << 16;
constexpr int kMaxCaches = 16;  // of a CPU

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

// Linux takes CPUs that go offline out of affinity masks. A mask that was read before may have
// them.
std::vector<int> UsableCpus(const TopologySource& source) {
  const std::vector<int> online = ReadCpuList(source.sysfs + "/devices/system/cpu/online");
  std::set<int> cpus, online_cpus;
  for (const int cpu : source.affinity) {
    if (cpu < 0 || cpu >= kMaxCpus) continue;
    cpus.insert(cpu);
    if (std::ranges::binary_search(online, cpu)) online_cpus.insert(cpu);
  }
  if (!online_cpus.empty()) return {online_cpus.begin(), online_cpus.end()};
  if (!cpus.empty()) return {cpus.begin(), cpus.end()};
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

// What the system says about one node.
struct NodeFacts {
  std::vector<int> cpus;
  int64_t memory_bytes = 0;
  std::vector<int> distances;  // to all nodes, in the order of their numbers
};

// Returns the first number after `key`, or 0. Lines are "Node 0 MemTotal:  65804188 kB" and alike.
int64_t NumberAfter(const std::string& text, const std::string& key) {
  const size_t at = text.find(key);
  if (at == std::string::npos) return 0;
  int64_t value = 0;
  std::istringstream(text.substr(at + key.size())) >> value;
  return std::max<int64_t>(value, 0);
}

std::vector<int> ReadDistances(const std::string& path) {
  std::istringstream text(ReadFile(path));
  std::vector<int> distances;
  for (int distance; text >> distance;) distances.push_back(distance);
  return distances;
}

// The nodes whose memory this process may use. Empty: the system does not say.
std::vector<int> PermittedMemory(const std::string& proc) {
  constexpr std::string_view kKey = "Mems_allowed_list:";
  const std::string text = ReadFile(proc + "/self/status");
  const size_t at = text.find(kKey);
  if (at == std::string::npos) return {};
  const std::string_view rest = std::string_view(text).substr(at + kKey.size());
  return ParseCpuList(rest.substr(0, rest.find('\n')));
}

std::map<int, NodeFacts> ReadNodes(const TopologySource& source) {
  const std::vector<int> permitted = PermittedMemory(source.proc);
  std::map<int, NodeFacts> nodes;
  std::error_code error;
  std::filesystem::directory_iterator entry(source.sysfs + "/devices/system/node", error);
  while (!error && entry != std::filesystem::directory_iterator()) {
    const std::string name = entry->path().filename().string();
    const int node = name.rfind("node", 0) == 0 ? ParseId(std::string_view(name).substr(4)) : -1;
    if (node >= 0) {
      const std::string directory = entry->path().string();
      NodeFacts& facts = nodes[node];
      facts.cpus = ReadCpuList(directory + "/cpulist");
      facts.distances = ReadDistances(directory + "/distance");
      if (permitted.empty() || std::ranges::binary_search(permitted, node)) {
        facts.memory_bytes = NumberAfter(ReadFile(directory + "/meminfo"), "MemTotal:") << 10;
      }
    }
    entry.increment(error);
  }
  return nodes;
}

// NumaNode::memory_node of node `id`.
int MemoryNodeOf(int id, const std::map<int, NodeFacts>& nodes) {
  const auto self = nodes.find(id);
  if (self == nodes.end() || self->second.memory_bytes > 0) return id;
  int nearest = id;
  int least = 0;
  size_t index = 0;
  for (const auto& [other, facts] : nodes) {
    const std::vector<int>& distances = self->second.distances;
    const int distance = index < distances.size() ? distances[index] : 255;
    ++index;
    if (facts.memory_bytes == 0 || (nearest != id && distance >= least)) continue;
    nearest = other;
    least = distance;
  }
  return nearest;
}

// The lowest CPU of those that share the CPU's L3 cache, or -1.
int FirstOfL3(const std::string& sysfs, int cpu) {
  const std::string caches =
      sysfs + "/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index";
  for (int i = 0; i < kMaxCaches; ++i) {
    const std::string cache = caches + std::to_string(i);
    const std::string level = ReadFile(cache + "/level");
    if (level.empty()) break;
    if (ParseId(Trim(level)) != 3) continue;
    const std::vector<int> cpus = ReadCpuList(cache + "/shared_cpu_list");
    return cpus.empty() ? -1 : cpus.front();
  }
  return -1;
}

int IdInFile(const std::string& path) { return std::max(ParseId(Trim(ReadFile(path))), 0); }

// Locates each CPU. Here `core` is the lowest usable CPU of the physical core, not yet an index.
std::vector<CpuLocation> LocateCpus(const TopologySource& source,
                                    const std::map<int, NodeFacts>& nodes) {
  std::map<int, int> node_of_cpu;
  for (const auto& [id, facts] : nodes) {
    for (const int cpu : facts.cpus) node_of_cpu.emplace(cpu, id);
  }
  std::map<int, int> core_of_cpu, l3_of_first;
  std::vector<CpuLocation> locations;
  for (const int cpu : UsableCpus(source)) {
    const std::string directory =
        source.sysfs + "/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology";
    if (core_of_cpu.emplace(cpu, cpu).second) {
      for (const int sibling : CoreSiblings(directory)) core_of_cpu.emplace(sibling, cpu);
    }
    const auto node = node_of_cpu.find(cpu);
    const int first = FirstOfL3(source.sysfs, cpu);
    const int next_l3 = static_cast<int>(l3_of_first.size());
    locations.push_back({.cpu = cpu,
                         .core = core_of_cpu.at(cpu),
                         .package = IdInFile(directory + "/physical_package_id"),
                         .node = node == node_of_cpu.end() ? 0 : node->second,
                         .l3 = first < 0 ? -1 : l3_of_first.emplace(first, next_l3).first->second});
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
  const std::map<int, NodeFacts> facts = ReadNodes(source);
  Topology topology;
  topology.cpus = LocateCpus(source, facts);
  std::map<int, NumaNode> nodes;
  std::set<std::pair<int, int>> cores;  // (node, the core's lowest usable CPU)
  for (const CpuLocation& location : topology.cpus) {
    nodes[location.node].cpus.push_back(location.cpu);
    if (location.core == location.cpu) cores.emplace(location.node, location.cpu);
    topology.l3_groups = std::max(topology.l3_groups, location.l3 + 1);
  }
  std::map<int, int> index_of_core;
  for (const auto& [node, cpu] : cores) {
    index_of_core.emplace(cpu, static_cast<int>(topology.cores.size()));
    topology.cores.push_back(cpu);
    nodes[node].cores.push_back(cpu);
  }
  for (CpuLocation& location : topology.cpus) location.core = index_of_core.at(location.core);
  for (const auto& [id, node] : facts) nodes[id].memory_bytes = node.memory_bytes;
  for (auto& [id, node] : nodes) {
    node.id = id;
    node.memory_node = MemoryNodeOf(id, facts);
    (node.cpus.empty() ? topology.other_nodes : topology.nodes).push_back(std::move(node));
  }

  topology.quota = CgroupCpuQuota(source.sysfs, source.proc);
  topology.default_threads = static_cast<int>(topology.cores.size());
  if (topology.quota < topology.default_threads) {
    topology.default_threads = std::max(1, static_cast<int>(topology.quota));
  }
  return topology;
}

}  // namespace cpumoe
