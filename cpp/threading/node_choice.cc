#include "threading/node_choice.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace cpumoe {
namespace {

constexpr std::string_view kSpaces = " \t\n";

std::string_view Trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(kSpaces);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpaces) - first + 1);
}

// Returns -1 if the text is no number of a node.
int ParseNumber(std::string_view text) {
  constexpr size_t kMostDigits = 5;
  const std::string_view digits = Trimmed(text);
  int number = -1;
  const char* const end = digits.data() + digits.size();
  const auto [stop, error] = std::from_chars(digits.data(), end, number);
  const bool whole = error == std::errc() && stop == end && digits.size() <= kMostDigits;
  return whole && number >= 0 ? number : -1;
}

// Returns nothing if a part between commas is no number.
std::vector<int> ParseNumbers(std::string_view text) {
  std::vector<int> numbers;
  for (;;) {
    const size_t comma = text.find(',');
    numbers.push_back(ParseNumber(text.substr(0, comma)));
    if (numbers.back() < 0) return {};
    if (comma == std::string_view::npos) return numbers;
    text.remove_prefix(comma + 1);
  }
}

std::string Listed(const std::vector<int>& numbers) {
  std::string text;
  for (const int number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

}  // namespace

NodeChoice ParseNodeChoice(std::string_view text, std::string_view name) {
  const std::string_view trimmed = Trimmed(text);
  if (trimmed == "auto") return {};
  if (trimmed == "1") return {.kind = NodeChoice::Kind::kOne};
  const bool bracketed = trimmed.size() >= 2 && trimmed.front() == '[' && trimmed.back() == ']';
  const std::vector<int> ids =
      ParseNumbers(bracketed ? trimmed.substr(1, trimmed.size() - 2) : trimmed);
  if (!ids.empty() && (bracketed || ids.size() > 1)) {
    return {.kind = NodeChoice::Kind::kNamed, .ids = ids};
  }
  throw std::invalid_argument(std::string(name) +
                              ": expected auto, 1 for the whole machine as one node, or node "
                              "numbers as in 0,2 or [1], got '" +
                              std::string(text) + "'");
}

std::vector<UsableNode> UsableNodes(const Topology& topology) {
  std::map<int, UsableNode> usable;
  for (const NumaNode& node : topology.nodes) {
    UsableNode& its = usable[node.memory_node];
    its.id = node.memory_node;
    its.cpus.insert(its.cpus.end(), node.cpus.begin(), node.cpus.end());
    its.cores.insert(its.cores.end(), node.cores.begin(), node.cores.end());
  }
  std::vector<UsableNode> nodes;
  for (auto& [id, node] : usable) {
    std::ranges::sort(node.cpus);
    nodes.push_back(std::move(node));
  }
  return nodes;
}

std::vector<UsableNode> ChooseNodes(const NodeChoice& choice, const Topology& topology,
                                    std::string_view name) {
  std::vector<UsableNode> usable = UsableNodes(topology);
  if (choice.kind == NodeChoice::Kind::kOne) return {};
  if (choice.kind == NodeChoice::Kind::kAll) {
    return usable.size() > 1 ? usable : std::vector<UsableNode>();
  }
  std::vector<int> known, missing;
  for (const UsableNode& node : usable) known.push_back(node.id);
  for (const int id : choice.ids) {
    if (std::ranges::find(known, id) == known.end()) missing.push_back(id);
  }
  std::vector<int> ids = choice.ids;
  std::ranges::sort(ids);
  const std::string subject(name);
  if (ids.empty()) throw std::invalid_argument(subject + ": expected at least one node, got none");
  if (std::ranges::adjacent_find(ids) != ids.end()) {
    throw std::invalid_argument(subject + ": expected each node once, got " + Listed(choice.ids));
  }
  if (!missing.empty()) {
    throw std::invalid_argument(subject +
                                ": expected nodes whose CPUs and memory this process may use, " +
                                Listed(known) + "; got " + Listed(missing));
  }
  std::erase_if(usable,
                [&](const UsableNode& node) { return !std::ranges::binary_search(ids, node.id); });
  return usable;
}

int UsefulThreads(const Topology& topology, std::span<const UsableNode> nodes) {
  if (nodes.empty()) return topology.default_threads;
  size_t cores = 0;
  for (const UsableNode& node : nodes) cores += node.cores.size();
  return std::max(1, static_cast<int>(std::min(topology.quota, static_cast<double>(cores))));
}

std::vector<int> DivideThreads(int threads, std::span<const int> cores) {
  std::vector<int> order(cores.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int a, int b) { return cores[a] > cores[b]; });
  order.resize(std::min(order.size(), static_cast<size_t>(std::max(threads, 0))));
  std::ranges::sort(order);
  std::vector<int> given(cores.size());
  for (const int node : order) given[node] = 1;
  for (int left = threads - static_cast<int>(order.size()); left > 0 && !order.empty(); --left) {
    // The node that has most cores for each of its threads, if it gets one more.
    const auto more = [&](int a, int b) {
      return int64_t{cores[a]} * (given[b] + 1) < int64_t{cores[b]} * (given[a] + 1);
    };
    ++given[*std::ranges::max_element(order, more)];
  }
  return given;
}

}  // namespace cpumoe
