// Which nodes of made-up machines a runtime uses.
#include "threading/node_choice.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace cpumoe {
namespace {

using Kind = NodeChoice::Kind;

std::string ErrorOf(const NodeChoice& choice, const Topology& topology) {
  try {
    ChooseNodes(choice, topology, "nodes");
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

// Nodes 0 and 2 have memory. Node 1 has none and uses that of node 2.
Topology ThreeNodes() {
  Topology topology;
  topology.nodes = {{.id = 0, .cpus = {0, 1, 4, 5}, .cores = {0, 1}, .memory_node = 0},
                    {.id = 1, .cpus = {2, 6}, .cores = {2}, .memory_node = 2},
                    {.id = 2, .cpus = {3, 7}, .cores = {3}, .memory_node = 2}};
  topology.quota = 3.5;
  topology.default_threads = 3;
  return topology;
}

TEST(NodeChoiceTest, TextsThatNameNodes) {
  EXPECT_EQ(ParseNodeChoice("auto", "x").kind, Kind::kAll);
  EXPECT_EQ(ParseNodeChoice(" 1 ", "x").kind, Kind::kOne);
  EXPECT_EQ(ParseNodeChoice("0,2", "x").ids, (std::vector{0, 2}));
  EXPECT_EQ(ParseNodeChoice("[1]", "x").ids, (std::vector{1}));
  const NodeChoice spaced = ParseNodeChoice("[0, 2]", "x");
  EXPECT_EQ(spaced.kind, Kind::kNamed);
  EXPECT_EQ(spaced.ids, (std::vector{0, 2}));
}

TEST(NodeChoiceTest, TextsThatNameNone) {
  for (const std::string text : {"", "all", "0", "2", "[", "[]", "1,", "-1,2", "[0;1]", "1 2", "]",
                                 "+1,2", "123456,1", "[1]]"}) {
    try {
      ParseNodeChoice(text, "x");
      ADD_FAILURE() << text;
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(),
                "x: expected auto, 1 for the whole machine as one node, or node numbers as in 0,2 "
                "or [1], got '" +
                    text + "'");
    }
  }
}

TEST(NodeChoiceTest, NodesWithoutMemoryAreParts) {
  const std::vector<UsableNode> nodes = UsableNodes(ThreeNodes());
  ASSERT_EQ(nodes.size(), 2u);
  EXPECT_EQ(nodes[0].cpus, (std::vector{0, 1, 4, 5}));
  EXPECT_EQ(nodes[1].id, 2);
  EXPECT_EQ(nodes[1].cpus, (std::vector{2, 3, 6, 7}));
  EXPECT_EQ(nodes[1].cores, (std::vector{2, 3}));
}

TEST(NodeChoiceTest, Choices) {
  const Topology topology = ThreeNodes();
  EXPECT_EQ(ChooseNodes({}, topology, "x").size(), 2u);
  EXPECT_EQ(ChooseNodes({.kind = Kind::kOne}, topology, "x").size(), 0u);
  const auto named = ChooseNodes({.kind = Kind::kNamed, .ids = {2}}, topology, "x");
  ASSERT_EQ(named.size(), 1u);
  EXPECT_EQ(named[0].id, 2);
  EXPECT_EQ(UsefulThreads(topology, named), 2);
  EXPECT_EQ(UsefulThreads(topology, ChooseNodes({}, topology, "x")), 3);
  EXPECT_EQ(UsefulThreads(topology, {}), 3);
  Topology one = topology;
  one.nodes.resize(1);
  EXPECT_EQ(ChooseNodes({}, one, "x").size(), 0u);
  EXPECT_EQ(ChooseNodes({.kind = Kind::kNamed, .ids = {0}}, one, "x").size(), 1u);
}

TEST(NodeChoiceTest, WrongChoices) {
  const Topology topology = ThreeNodes();
  EXPECT_EQ(ErrorOf({.kind = Kind::kNamed}, topology),
            "nodes: expected at least one node, got none");
  EXPECT_EQ(ErrorOf({.kind = Kind::kNamed, .ids = {2, 0, 2}}, topology),
            "nodes: expected each node once, got [2, 0, 2]");
  EXPECT_EQ(ErrorOf({.kind = Kind::kNamed, .ids = {0, 1}}, topology),
            "nodes: expected nodes whose CPUs and memory this process may use, [0, 2]; got [1]");
}

struct Division {
  int threads;
  std::vector<int> cores, expected;
};

TEST(NodeChoiceTest, ThreadsAreDividedInProportionToCores) {
  for (const Division& d : std::vector<Division>{{8, {4, 4}, {4, 4}},
                                                 {7, {4, 4}, {4, 3}},
                                                 {6, {8, 4}, {4, 2}},
                                                 {24, {8, 4}, {16, 8}},
                                                 {2, {4, 4, 4}, {1, 1, 0}},
                                                 {2, {2, 8, 4}, {0, 1, 1}},
                                                 {1, {2, 2}, {1, 0}},
                                                 {5, {1, 1, 1, 1}, {2, 1, 1, 1}},
                                                 {3, {}, {}},
                                                 {0, {2}, {0}}}) {
    EXPECT_EQ(DivideThreads(d.threads, d.cores), d.expected) << d.threads;
  }
}

}  // namespace
}  // namespace cpumoe
