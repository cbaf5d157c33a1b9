#include "threading/topology.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "cpp/made_up_machine.h"

namespace cpumoe {
namespace {

constexpr char kV2Mount[] =
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
constexpr char kV1Mount[] =
    "33 32 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n";

TEST_F(TopologyTest, LaptopWithSmt) {
  for (int cpu = 0; cpu < 8; ++cpu) AddCpu(cpu, Text(cpu % 4) + "," + Text(cpu % 4 + 4));
  AddNode(0, "0-7");
  const Topology topology = Read(Range(0, 7));
  EXPECT_EQ(topology.cpus.size(), 8u);
  EXPECT_EQ(topology.cores, Range(0, 3));
  EXPECT_EQ(topology.cpus[6].cpu, 6);
  EXPECT_EQ(topology.cpus[6].core, 2);
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].cpus, Range(0, 7));
  EXPECT_TRUE(std::isinf(topology.quota));
  EXPECT_EQ(topology.default_threads, 4);
}

TEST_F(TopologyTest, HybridCpuWithAndWithoutSmt) {
  AddCpu(0, "0-1");
  AddCpu(1, "0-1");
  AddCpu(2, "2");
  AddCpu(3, "3");
  const Topology topology = Read(Range(0, 3));
  EXPECT_EQ(topology.cores, (std::vector<int>{0, 2, 3}));
  EXPECT_EQ(topology.default_threads, 3);
}

TEST_F(TopologyTest, PrefersTheNewerSiblingsFile) {
  for (int cpu = 0; cpu < 2; ++cpu) {
    AddCpu(cpu, Text(cpu));
    Write("/sys/devices/system/cpu/cpu" + Text(cpu) + "/topology/core_cpus_list", "0-1\n");
  }
  EXPECT_EQ(Read({0, 1}).cores, std::vector<int>{0});
}

// CPU numbers alternate between the sockets, as with some firmware.
TEST_F(TopologyTest, TwoSocketsOrderCoresNodeByNode) {
  for (int cpu = 0; cpu < 16; ++cpu) AddCpu(cpu, Text(cpu % 8) + "," + Text(cpu % 8 + 8), cpu % 2);
  AddNode(0, "0,2,4,6,8,10,12,14");
  AddNode(1, "1,3,5,7,9,11,13,15");
  AddNode(2, "");  // memory without CPUs
  Write("/sys/devices/system/node/possible", "0-2\n");
  const Topology topology = Read(Range(0, 15));
  EXPECT_EQ(topology.cores, (std::vector<int>{0, 2, 4, 6, 1, 3, 5, 7}));
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_EQ(topology.nodes[1].id, 1);
  EXPECT_EQ(topology.nodes[1].cpus.front(), 1);
  EXPECT_EQ(topology.cpus[9].package, 1);
  EXPECT_EQ(topology.cpus[9].node, 1);
  EXPECT_EQ(topology.cores[static_cast<size_t>(topology.cpus[9].core)], 1);
  EXPECT_EQ(topology.default_threads, 8);
}

TEST_F(TopologyTest, MaskSmallerThanTheMachine) {
  for (int cpu = 0; cpu < 16; ++cpu)
    AddCpu(cpu, Text(cpu % 8) + "," + Text(cpu % 8 + 8), cpu / 4 % 2);
  AddNode(0, "0-3,8-11");
  AddNode(1, "4-7,12-15");
  // CPUs 5 and 13 share a core. Node 0 has no CPU of ours.
  const Topology topology = Read({13, 5, 6, 5});
  ASSERT_EQ(topology.cpus.size(), 3u);
  EXPECT_EQ(topology.cpus[0].cpu, 5);
  EXPECT_EQ(topology.cores, (std::vector<int>{5, 6}));
  EXPECT_EQ(topology.cpus[2].core, 0);
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].id, 1);
  EXPECT_EQ(topology.default_threads, 2);
  EXPECT_EQ(Read({12}).cores, std::vector<int>{12}) << "the second sibling alone is a core";
}

TEST_F(TopologyTest, CpusBeyond1024) {
  AddCpu(1500, "1500,1501");
  AddCpu(1501, "1500,1501");
  EXPECT_EQ(Read({1500, 1501}).cores, std::vector<int>{1500});
}

TEST_F(TopologyTest, CgroupV2SmallestOfTheAncestorsWins) {
  SetCgroup("0::/a/b/c\n", kV2Mount);
  Write("/sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  Write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  Write("/sys/fs/cgroup/a/b/c/cpu.max", "400000 100000\n");
  const Topology topology = Read(Range(0, 7));
  EXPECT_DOUBLE_EQ(topology.quota, 1.5);
  EXPECT_EQ(topology.default_threads, 1);
  EXPECT_EQ(topology.cores.size(), 8u) << "the quota does not hide cores";
}

TEST_F(TopologyTest, QuotaIsRoundedDownButNotToZeroAndNeverRaises) {
  struct Case {
    const char* cpu_max;
    double quota;
    int threads;
  };
  for (const Case& c : {Case{"50000 100000", 0.5, 1}, Case{"200000 100000", 2, 2},
                        Case{"299999 100000", 2.99999, 2}, Case{"6400000 100000", 64, 4}}) {
    SetCgroup("0::/\n", kV2Mount);
    Write("/sys/fs/cgroup/cpu.max", c.cpu_max);
    const Topology topology = Read(Range(0, 3));
    EXPECT_DOUBLE_EQ(topology.quota, c.quota);
    EXPECT_EQ(topology.default_threads, c.threads) << c.cpu_max;
  }
}

TEST_F(TopologyTest, CgroupV1) {
  SetCgroup("5:memory:/m\n4:cpu,cpuacct:/job/step\n1:name=systemd:/x\n0::/job\n", kV1Mount);
  Write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "250000\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us", "-1\n");
  const Topology topology = Read(Range(0, 7));
  EXPECT_DOUBLE_EQ(topology.quota, 2.5);
  EXPECT_EQ(topology.default_threads, 2);
}

// Docker with v1: the container's cgroup is the root of a bind mount, and /proc shows the host's
// path.
TEST_F(TopologyTest, BindMountedCgroupV1) {
  SetCgroup("4:cpu:/docker/1234\n",
            "33 32 0:30 /docker/1234 /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  EXPECT_DOUBLE_EQ(Read(Range(0, 7)).quota, 3);
}

// The path names a cgroup that the mount does not show. Only the mount's root can be read.
TEST_F(TopologyTest, NamespacedCgroupFallsBackToTheMountRoot) {
  Write("/sys/fs/cgroup/cpu.max", "200000 100000\n");
  for (const char* path : {"/kubepods/pod7/abc", "/", "/../../other"}) {
    SetCgroup(std::string("0::") + path + "\n", kV2Mount);
    EXPECT_DOUBLE_EQ(Read(Range(0, 7)).quota, 2) << path;
  }
  SetCgroup("0::/elsewhere\n", "30 23 0:26 /pod7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  EXPECT_DOUBLE_EQ(Read(Range(0, 7)).quota, 2);
}

TEST_F(TopologyTest, MountsThatShowTheProcessComeFirst) {
  SetCgroup("0::/mine\n",
            "30 23 0:26 /other /sys/other rw - cgroup2 cgroup2 rw\n" + std::string(kV2Mount));
  Write("/sys/other/cpu.max", "100000 100000\n");
  Write("/sys/fs/cgroup/mine/cpu.max", "300000 100000\n");
  EXPECT_DOUBLE_EQ(Read(Range(0, 7)).quota, 3);
}

TEST_F(TopologyTest, MountPointWithEscapedSpaceOutsideSys) {
  std::string escaped = root_ + "/my\\040cgroups";
  SetCgroup("0::/a\n", "30 23 0:26 / " + escaped + " rw - cgroup2 cgroup2 rw\n");
  Write("/my cgroups/a/cpu.max", "200000 100000\n");
  EXPECT_DOUBLE_EQ(Read(Range(0, 7)).quota, 2);
}

TEST_F(TopologyTest, EmptyTree) {
  const Topology topology = Read(Range(0, 3));
  EXPECT_EQ(topology.cores, Range(0, 3)) << "every CPU counts as a core";
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].cpus, Range(0, 3));
  EXPECT_TRUE(std::isinf(topology.quota));
  EXPECT_EQ(topology.default_threads, 4);
}

TEST_F(TopologyTest, NoAffinityFallsBackToOnlineCpusThenToOne) {
  EXPECT_EQ(Read({}).default_threads, 1);
  EXPECT_EQ(Read({-3, 1 << 30}).cores, std::vector<int>{0});
  Write("/sys/devices/system/cpu/online", "0-2\n");
  EXPECT_EQ(Read({}).cores, Range(0, 2));
}

TEST_F(TopologyTest, MalformedSiblingsAndNodes) {
  AddCpu(0, "zero,one");
  AddCpu(1, "1-99999999999999999999");
  AddCpu(2, "0-65535");  // no core has that many threads
  AddCpu(3, "3-1,,-,3--4, 5", -1);
  AddNode(0, "0-1,x,2");
  AddNode(99999999, "3");
  Write("/sys/devices/system/node/nodeX/cpulist", "3");
  std::filesystem::create_directories(root_ + "/sys/devices/system/node/node7/cpulist");
  const Topology topology = Read(Range(0, 3));
  EXPECT_EQ(topology.cores, Range(0, 3));
  EXPECT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.cpus[3].package, 0);
}

TEST_F(TopologyTest, MalformedQuotasAreNoLimit) {
  for (const char* cpu_max : {"", "max", "max 100000", "abc def", "100000", "100000 0", "-5 100000",
                              "0 100000", "nan 1", "1e999 1", "100000 -1"}) {
    SetCgroup("0::/\n", kV2Mount);
    Write("/sys/fs/cgroup/cpu.max", cpu_max);
    EXPECT_TRUE(std::isinf(Read(Range(0, 3)).quota)) << cpu_max;
  }
}

TEST_F(TopologyTest, MalformedCgroupAndMountinfo) {
  Write("/sys/fs/cgroup/cpu.max", "100000 100000\n");
  const std::string deep = "0::" + std::string(50'000, '/') + "\n";
  for (const std::string& cgroup : {std::string("\n:\n::\nxx"), std::string("0:"), deep}) {
    for (const char* mounts : {"", " - ", "a b - cgroup2", "1 2 3 / \\04 rw - cgroup2 x y\n"}) {
      SetCgroup(cgroup, mounts);
      EXPECT_EQ(Read(Range(0, 3)).default_threads, 4) << cgroup.substr(0, 10) << '|' << mounts;
    }
  }
  SetCgroup(deep + "0::no-slash\n", kV2Mount);
  EXPECT_EQ(Read(Range(0, 3)).default_threads, 1);
}

TEST(Topology, ThisMachine) {
  const Topology topology = ReadTopology();
  EXPECT_EQ(topology.cpus.size(), ProcessAffinity().size());
  EXPECT_GE(topology.default_threads, 1);
  EXPECT_LE(topology.cores.size(), topology.cpus.size());
  EXPECT_LE(static_cast<size_t>(topology.default_threads), topology.cores.size());
  size_t cpus = 0;
  for (const NumaNode& node : topology.nodes) cpus += node.cpus.size();
  EXPECT_EQ(cpus, topology.cpus.size());
}

}  // namespace
}  // namespace cpumoe
