// The CPU time that control groups grant to this process.
#pragma once

#include <string>

namespace cpumoe {

// CPUs' worth of time, the smallest over the process's cgroup and its visible ancestors, version 2
// (cpu.max) and version 1 (cpu.cfs_quota_us / cpu.cfs_period_us); infinity where none is set.
// `sysfs` and `proc` stand for /sys and /proc.
double CgroupCpuQuota(const std::string& sysfs, const std::string& proc);

}  // namespace cpumoe
