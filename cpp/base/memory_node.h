// Memories of a machine that has several: NUMA nodes, and which of them pages come from.
#pragma once

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <climits>
#include <cstddef>

namespace cpumoe {

// The most nodes that a runtime or a layer may have.
inline constexpr size_t kMaxMemoryNodes = 64;

// The number of no node: the system chooses where memory comes from.
inline constexpr int kAnyNode = -1;

// A node by the number that the system gives it, and how many threads compute with its memory.
struct MemoryNode {
  int id = kAnyNode;
  int threads = 1;
};

// Memory that should come from one node.
struct MemoryShare {
  int node = kAnyNode;
  const std::byte* data = nullptr;
  size_t bytes = 0;
  bool bound = false;  // PreferNode has succeeded
};

// Lets the pages of [address, address + bytes) come from `node`, as long as it has free memory, and
// stay there. Works for pages that no thread has touched yet. Needs no privilege, but a container
// may refuse it. Returns false then, and if there is no such node.
inline bool PreferNode(std::byte* address, size_t bytes, int node) {
  constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;
  std::array<unsigned long, 1024 / kBits> mask{};
  if (node < 0 || node >= static_cast<int>(mask.size()) * kBits) return false;
  mask[node / kBits] = 1ul << (node % kBits);
  // The system ignores the last of the bits that it is told of.
  return syscall(SYS_mbind, address, bytes, MPOL_PREFERRED, mask.data(), mask.size() * kBits + 1,
                 0) == 0;
}

}  // namespace cpumoe
