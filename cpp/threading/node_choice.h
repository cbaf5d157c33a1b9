// Which NUMA nodes a runtime uses, and how many threads each of them gets.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "threading/topology.h"

namespace cpumoe {

// The environment variable that has the choice where the caller makes none.
inline constexpr char kNodesVariable[] = "CPUMOE_NODES";

struct NodeChoice {
  enum class Kind {
    kAll,    // those whose CPUs and memory this process may use, as far as there are threads
    kOne,    // the machine counts as one node
    kNamed,  // those in `ids`
  };
  Kind kind = Kind::kAll;
  std::vector<int> ids = {};
};

// A node with memory, and the CPUs whose threads should use this memory.
struct UsableNode {
  int id = 0;
  std::vector<int> cpus = {};   // ascending
  std::vector<int> cores = {};  // one of the CPUs of each physical core
};

// Returns the choice that a text names: "auto", "1" for the machine as one node, or numbers of
// nodes separated by commas, in brackets if there is one. Throws std::invalid_argument, which
// begins with `name`, if the text is something else.
NodeChoice ParseNodeChoice(std::string_view text, std::string_view name);

// Returns the nodes with memory, ascending. A node without memory is part of the nearest one.
std::vector<UsableNode> UsableNodes(const Topology& topology);

// Returns the chosen nodes, ascending; none if the machine counts as one node. Throws
// std::invalid_argument, which begins with `name`, if a node that `choice` names is not usable or
// is named twice.
std::vector<UsableNode> ChooseNodes(const NodeChoice& choice, const Topology& topology,
                                    std::string_view name);

// Returns the number of cores, of nodes if there are any, capped by the CPU quota.
int UsefulThreads(const Topology& topology, std::span<const UsableNode> nodes);

// Returns how many of `threads` threads each node gets, in proportion to its cores. Each node gets
// a thread. If there are fewer threads than nodes, those with most cores get one each, and the
// others get none.
std::vector<int> DivideThreads(int threads, std::span<const int> cores);

}  // namespace cpumoe
