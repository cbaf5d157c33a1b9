#include "threading/cgroup_quota.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <vector>

namespace cpumoe {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
constexpr size_t kMaxLines = 100'000;
constexpr int kMaxDepth = 1000;

struct Mount {
  bool v2 = false;
  std::string root;  // the cgroup that is mounted at `point`
  std::string point;
};

// The process's cgroup in one hierarchy.
struct Membership {
  bool v2 = false;
  std::string path;
};

template <class Handle>
void ForEachLine(const std::string& path, Handle handle) {
  std::ifstream file(path);
  std::string line;
  for (size_t i = 0; i < kMaxLines && std::getline(file, line); ++i) handle(line);
}

bool ListHas(const std::string& comma_separated, const std::string& item) {
  std::istringstream stream(comma_separated);
  for (std::string part; std::getline(stream, part, ',');) {
    if (part == item) return true;
  }
  return false;
}

// mountinfo writes space, tab, newline and backslash as \ooo.
std::string Unescape(const std::string& text) {
  const auto octal = [&](size_t i) { return i < text.size() && text[i] >= '0' && text[i] <= '7'; };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      out +=
          static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + text[i + 3] - '0');
      i += 3;
    } else {
      out += text[i];
    }
  }
  return out;
}

// Parses a line of mountinfo: "36 35 98:0 ROOT POINT options [optional fields…] - TYPE source
// SUPER_OPTIONS".
std::optional<Mount> ParseMount(const std::string& line) {
  const size_t dash = line.find(" - ");
  if (dash == std::string::npos) return std::nullopt;
  std::istringstream head(line.substr(0, dash));
  std::istringstream tail(line.substr(dash + 3));
  std::string skip, root, point, type, super_options;
  if (!(head >> skip >> skip >> skip >> root >> point)) return std::nullopt;
  if (!(tail >> type >> skip >> super_options)) return std::nullopt;
  const bool v1 = type == "cgroup" && ListHas(super_options, "cpu");
  if (type != "cgroup2" && !v1) return std::nullopt;
  return Mount{!v1, Unescape(root), Unescape(point)};
}

// Parses a line of /proc/self/cgroup: "0::/path" (version 2) or "4:cpu,cpuacct:/path".
std::optional<Membership> ParseMembership(const std::string& line) {
  const size_t first = line.find(':');
  const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
  if (second == std::string::npos) return std::nullopt;
  const std::string controllers = line.substr(first + 1, second - first - 1);
  if (!controllers.empty() && !ListHas(controllers, "cpu")) return std::nullopt;
  return Membership{controllers.empty(), line.substr(second + 1)};
}

// Returns `path` relative to the mount's root: "" for the root itself, nothing if the mount does
// not show `path`.
std::optional<std::string> PathUnder(const std::string& root, const std::string& path) {
  if (path.find("/..") != std::string::npos) return std::nullopt;  // outside our cgroup namespace
  const std::string prefix = root == "/" ? "" : root;
  if (path.compare(0, prefix.size(), prefix) != 0) return std::nullopt;
  std::string rest = path.substr(prefix.size());
  if (rest.empty() || rest == "/") return "";
  if (rest[0] != '/') return std::nullopt;
  return rest;
}

double Ratio(double quota, double period) {
  const bool limits = std::isfinite(quota) && std::isfinite(period) && quota > 0 && period > 0;
  return limits ? quota / period : kNoLimit;
}

double QuotaOfDirectory(const std::string& directory, bool v2) {
  double quota = 0;
  double period = 0;
  if (v2) {
    // "max 100000" does not parse as a number, and therefore sets no limit.
    std::ifstream(directory + "/cpu.max") >> quota >> period;
  } else {
    std::ifstream(directory + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(directory + "/cpu.cfs_period_us") >> period;
  }
  return Ratio(quota, period);
}

double QuotaOfPath(const std::string& point, std::string path, bool v2) {
  double quota = QuotaOfDirectory(point, v2);
  for (int depth = 0; depth < kMaxDepth && !path.empty(); ++depth) {
    quota = std::min(quota, QuotaOfDirectory(point + path, v2));
    path.resize(path.rfind('/'));
  }
  return quota;
}

// Prefers a mount that shows the process's cgroup. If there is none, a container runtime has
// mounted that cgroup as the root of some mount, under a path that /proc does not show.
double QuotaOfMembership(const Membership& membership, const std::vector<Mount>& mounts) {
  const Mount* fallback = nullptr;
  for (const Mount& mount : mounts) {
    if (mount.v2 != membership.v2) continue;
    if (const auto path = PathUnder(mount.root, membership.path)) {
      return QuotaOfPath(mount.point, *path, mount.v2);
    }
    if (fallback == nullptr) fallback = &mount;
  }
  return fallback == nullptr ? kNoLimit : QuotaOfDirectory(fallback->point, fallback->v2);
}

}  // namespace

double CgroupCpuQuota(const std::string& sysfs, const std::string& proc) {
  std::vector<Mount> mounts;
  ForEachLine(proc + "/self/mountinfo", [&](const std::string& line) {
    std::optional<Mount> mount = ParseMount(line);
    if (!mount) return;
    if (mount->point.rfind("/sys/", 0) == 0) mount->point = sysfs + mount->point.substr(4);
    mounts.push_back(*std::move(mount));
  });
  double quota = kNoLimit;
  ForEachLine(proc + "/self/cgroup", [&](const std::string& line) {
    if (const auto membership = ParseMembership(line)) {
      quota = std::min(quota, QuotaOfMembership(*membership, mounts));
    }
  });
  return quota;
}

}  // namespace cpumoe
