// The CPU time that control groups grant to this process.
#pragma once

#include <string>

namespace cpumoe {

// Returns the CPU time granted, in CPUs, or infinity if nothing limits it. The result is the
// smallest quota of the process's cgroup and its visible ancestors, of version 2 (cpu.max) and
// version 1 (cpu.cfs_quota_us / cpu.cfs_period_us). `sysfs` and `proc` stand for /sys and /proc.
double CgroupCpuQuota(const std::string& sysfs, const std::string& proc);

}  // namespace cpumoe
