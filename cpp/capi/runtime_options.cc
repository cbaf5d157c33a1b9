#include "capi/runtime_options.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "threading/node_choice.h"
#include "threading/pinned_pool.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

// Numbers of CPUs or of nodes.
std::vector<int> Numbers(const int32_t* numbers, int32_t count, const std::string& name) {
  RequireCount(count, "num_", name);
  if (count > 0) RequireAddress(numbers, name);
  for (int32_t i = 0; i < count; ++i) RequireCount(numbers[i], name, "[", i, "]");
  return {numbers, numbers + count};
}

// The NUMA nodes that the program, or the environment, chooses. `name` gets the name of the choice.
NodeChoice ToNodeChoice(const cpumoe_runtime_options& options, std::string& name) {
  name = "nodes";
  const std::vector<int> ids = Numbers(options.nodes, options.num_nodes, name);
  Require(ids.empty() || (options.num_cpus == 0 && options.ignore_nodes == 0),
          "nodes: expected none beside cpus or ignore_nodes, got ", ids.size());
  if (!ids.empty()) return {.kind = NodeChoice::Kind::kNamed, .ids = ids};
  if (options.ignore_nodes != 0) return {.kind = NodeChoice::Kind::kOne};
  const char* const text = std::getenv(kNodesVariable);
  if (text == nullptr || *text == '\0') return {};
  name = kNodesVariable;
  const NodeChoice choice = ParseNodeChoice(text, name);
  // CPUs that the program names matter more than nodes that the environment names.
  const bool overruled = options.num_cpus > 0 && choice.kind == NodeChoice::Kind::kNamed;
  return overruled ? NodeChoice{} : choice;
}

// Divides the threads among nodes that were chosen; `cpus` are those that the program names.
std::vector<NodeThreads> Divide(int threads, const std::vector<UsableNode>& nodes,
                                const std::vector<int>& cpus, bool named) {
  std::vector<std::vector<int>> places;
  std::vector<int> counts;
  for (const UsableNode& node : nodes) {
    std::vector<int>& place = places.emplace_back(node.cpus);
    if (!cpus.empty()) {
      place = cpus;
      std::erase_if(place, [&](int cpu) { return !std::ranges::binary_search(node.cpus, cpu); });
    }
    counts.push_back(static_cast<int>(cpus.empty() ? node.cores.size() : place.size()));
  }
  Require(!named || threads >= std::ssize(nodes), "nodes: expected at most as many as threads, ",
          threads, ", got ", nodes.size());
  if (threads == 1 && !named) return {};  // a single thread needs no node
  const std::vector<int> given = DivideThreads(threads, counts);
  std::vector<NodeThreads> divided;
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (given[i] == 0) continue;
    divided.push_back({.memory = {.id = nodes[i].id, .threads = given[i]},
                       .cpus = std::move(places[i]),
                       .one_cpu_each = !cpus.empty()});
  }
  return divided;
}

}  // namespace

Node::Options ToNodeOptions(const cpumoe_runtime_options& options) {
  Node::Options node;
  node.cpus = Numbers(options.cpus, options.num_cpus, "cpus");
  std::string name;
  const NodeChoice choice = ToNodeChoice(options, name);
  const Topology topology =
      node.cpus.empty() ? ReadTopology() : ReadTopology({.affinity = node.cpus});
  const std::vector<UsableNode> nodes = ChooseNodes(choice, topology, name);
  node.threads = options.threads;
  if (node.threads == 0) {
    node.threads = node.cpus.empty() ? UsefulThreads(topology, nodes) : options.num_cpus;
  }
  // The pool refuses other numbers.
  if (!nodes.empty() && node.threads >= 1 && node.threads <= PinnedPool::kMaxThreads) {
    const bool named = choice.kind == NodeChoice::Kind::kNamed;
    node.nodes = Divide(node.threads, nodes, node.cpus, named);
  }
  return node;
}

}  // namespace cpumoe
