// Memory of a node, and where its pages lie.
#include "base/memory_node.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpp/forked_child.h"
#include "engine/placement.h"

namespace cpumoe {
namespace {

constexpr size_t kBytes = size_t{5} << 20;
constexpr int kNoNode = 1000;  // within the system's limits, but on no test machine

MemoryShare Share(const AlignedBuffer& buffer, int node) {
  return {.node = node, .data = buffer.data(), .bytes = buffer.size(), .bound = buffer.bound()};
}

Placement PlacementOf(const MemoryShare& share) {
  return PlacementOf(std::vector<MemoryShare>{share}, "/nowhere").front();
}

// The first node that the system lets us ask for; kAnyNode: it refuses all.
int SomeNode() {
  for (int node = 0; node < 64; ++node) {
    if (AlignedBuffer(kBytes, node).bound()) return node;
  }
  return kAnyNode;
}

TEST(MemoryNode, PagesComeFromTheNodeAskedFor) {
  const int node = SomeNode();
  if (node == kAnyNode) GTEST_SKIP() << "the system refuses mbind";
  const AlignedBuffer buffer(kBytes, node);
  EXPECT_EQ(PlacementOf(Share(buffer, node)).pages, 0) << "nothing has been written yet";
  std::memset(buffer.data(), 1, kBytes);
  const Placement placement = PlacementOf(Share(buffer, node));
  EXPECT_EQ(placement.local, placement.pages);
  EXPECT_LE(placement.pages, 4096);
  EXPECT_EQ(PlacementOf(Share(buffer, kNoNode)).local, 0);
}

TEST(MemoryNode, MissingNodesAndNoNodeAreNotBound) {
  for (const int node : {kAnyNode, -7, kNoNode, 1 << 20}) {
    AlignedBuffer buffer(kBytes, node);
    EXPECT_FALSE(buffer.bound()) << node;
    std::memset(buffer.data(), 1, kBytes);
  }
  EXPECT_FALSE(AlignedBuffer(0, 0).bound());
  EXPECT_EQ(PlacementOf(MemoryShare{}).pages, 0);
}

TEST(MemoryNode, ABufferKeepsItsNodeWhenItMoves) {
  AlignedBuffer first(kBytes, SomeNode());
  const bool bound = first.bound();
  AlignedBuffer second(std::move(first));
  EXPECT_EQ(second.bound(), bound);
  AlignedBuffer third(100);
  third = std::move(second);
  EXPECT_EQ(third.bound(), bound);
}

// Answers EPERM to calls about memory nodes, as a container's filter does. Returns whether the
// filter works.
bool RefuseMemoryCalls() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mbind, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_move_pages, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
  };
  sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(MemoryNode, MappingsAreFoundByTheirBegin) {
  constexpr char kMaps[] =
      "556600000000 default file=/usr/bin/x mapped=3 N0=3 kernelpagesize_kB=4\n"
      "7f0000000000 prefer:1 anon=512 dirty=512 N0=2 N1=510 kernelpagesize_kB=4\n"
      "7f0000200000 default\n"
      "garbage N0=7\n"
      "7f0000400000 default anon=1 N12=1 Nx=3 N1= N=1 kernelpagesize_kB=4\n";
  using Pages = std::map<int, int64_t>;
  EXPECT_EQ(PagesOfMapping(kMaps, 0x7f0000000000), (Pages{{0, 2}, {1, 510}}));
  EXPECT_EQ(PagesOfMapping(kMaps, 0x7f00001fffff), (Pages{{0, 2}, {1, 510}}));
  EXPECT_EQ(PagesOfMapping(kMaps, 0x7f0000200000), Pages());
  EXPECT_EQ(PagesOfMapping(kMaps, 0x7f0000400000), (Pages{{12, 1}}));
  EXPECT_EQ(PagesOfMapping(kMaps, 0x1000), Pages());
  EXPECT_EQ(PagesOfMapping("", 0x1000), Pages());
}

TEST(MemoryNode, WithoutPermissionMemoryIsNotBoundAndPagesAreUnknown) {
  const int node = SomeNode();
  const int result = ResultInChild([&] {
    if (!RefuseMemoryCalls()) return 7;
    const AlignedBuffer buffer(kBytes, node);
    if (buffer.bound()) return 2;
    std::memset(buffer.data(), 1, kBytes);
    if (PlacementOf(Share(buffer, node)).pages != 0) return 3;
    const Placement mapping = PlacementOf(std::vector{Share(buffer, node)}).front();
    return mapping.local <= mapping.pages ? 0 : 4;
  });
  if (result == 7) GTEST_SKIP() << "the system has no filters for system calls";
  EXPECT_EQ(result, 0);
}

}  // namespace
}  // namespace cpumoe
