// Where the pages of packed weights lie.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory_node.h"

namespace cpumoe {

// A share, and where some of its pages lie. Pages that have no memory yet do not count.
struct Placement {
  MemoryShare share;
  int64_t pages = 0;  // that the system has told of; 0: it tells nothing
  int64_t local = 0;  // of these, on the share's node
};

// Asks for up to 4,096 pages of each share, evenly spread. Where the system refuses to say where
// single pages lie, as in a container, the result counts all pages of the mapping that has the
// share (`proc`/self/numa_maps).
std::vector<Placement> PlacementOf(const std::vector<MemoryShare>& shares,
                                   const std::string& proc = "/proc");

// Returns the pages on each node of the mapping that has an address, from the text of numa_maps.
std::map<int, int64_t> PagesOfMapping(std::string_view numa_maps, uintptr_t address);

}  // namespace cpumoe
