// A made-up machine: trees that stand for /sys and /proc.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "threading/topology.h"

namespace cpumoe {

inline std::vector<int> Range(int first, int last) {
  std::vector<int> cpus(static_cast<size_t>(last - first + 1));
  std::iota(cpus.begin(), cpus.end(), first);
  return cpus;
}

inline std::string Text(int number) { return std::to_string(number); }

class TopologyTest : public testing::Test {
 protected:
  TopologyTest() {
    std::string path = std::filesystem::temp_directory_path() / "cpumoe-topology-XXXXXX";
    root_ = mkdtemp(path.data());
  }
  ~TopologyTest() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }

  void AddCpu(int cpu, const std::string& siblings, int package = 0) {
    const std::string directory = "/sys/devices/system/cpu/cpu" + Text(cpu) + "/topology/";
    Write(directory + "thread_siblings_list", siblings + "\n");
    Write(directory + "physical_package_id", Text(package) + "\n");
  }

  // Gives a CPU caches of levels 1 to 3. The last is shared by `cpus`.
  void AddCaches(int cpu, const std::string& cpus) {
    for (int index = 0; index < 4; ++index) {
      const std::string directory =
          "/sys/devices/system/cpu/cpu" + Text(cpu) + "/cache/index" + Text(index) + "/";
      Write(directory + "level", Text(index == 0 ? 1 : index) + "\n");
      Write(directory + "shared_cpu_list", (index < 3 ? Text(cpu) : cpus) + "\n");
    }
  }

  void AddNode(int node, const std::string& cpus, int64_t memory_kib = 0,
               const std::string& distances = "") {
    const std::string directory = "/sys/devices/system/node/node" + Text(node) + "/";
    Write(directory + "cpulist", cpus + "\n");
    Write(directory + "distance", distances + "\n");
    const std::string begin = "Node " + Text(node) + " ";
    Write(directory + "meminfo", begin + "MemTotal: \t" + std::to_string(memory_kib) + " kB\n" +
                                     begin + "MemFree: 1 kB\n");
  }

  void SetCgroup(const std::string& memberships, const std::string& mountinfo) {
    Write("/proc/self/cgroup", memberships);
    Write("/proc/self/mountinfo", "22 1 0:21 / /proc rw shared:5 - proc proc rw\n" + mountinfo);
  }

  Topology Read(std::vector<int> affinity) {
    return ReadTopology(
        {.sysfs = root_ + "/sys", .proc = root_ + "/proc", .affinity = std::move(affinity)});
  }

  std::string root_;
};

}  // namespace cpumoe
