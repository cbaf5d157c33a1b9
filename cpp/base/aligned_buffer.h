// Owning, cache-line aligned memory; large buffers come on huge pages where the kernel grants them.
//
// Reading weights through 4 KiB pages costs about a third of the memory bandwidth in page walks, so
// buffers of 2 MiB and more are aligned to 2 MiB and advised MADV_HUGEPAGE. Pages are zero and not
// yet backed. Unless the buffer is bound to a NUMA node, the thread that first writes a page
// decides the node that the page comes from.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <new>
#include <system_error>
#include <utility>

#include "base/bits.h"
#include "base/memory_node.h"

namespace cpumoe {

class AlignedBuffer {
 public:
  static constexpr size_t kHugePage = size_t{2} << 20;
  static constexpr size_t kCacheLine = 64;

  AlignedBuffer() = default;
  // Memory of `node`, unless that is kAnyNode or the system refuses (bound).
  explicit AlignedBuffer(size_t size, int node = kAnyNode) : size_(size), node_(node) {
    if (size == 0) return;
    Map();
    bound_ = node != kAnyNode && PreferNode(base_, mapped_, node);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        mapped_(std::exchange(other.mapped_, 0)),
        size_(std::exchange(other.size_, 0)),
        node_(std::exchange(other.node_, kAnyNode)),
        bound_(std::exchange(other.bound_, false)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(mapped_, other.mapped_);
    std::swap(size_, other.size_);
    std::swap(node_, other.node_);
    std::swap(bound_, other.bound_);
    return *this;
  }
  ~AlignedBuffer() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }

  std::byte* data() const { return base_; }
  size_t size() const { return size_; }
  // Whether the memory comes from the node that the constructor was given.
  bool bound() const { return bound_; }
  // The buffer as memory of the node that the constructor was given.
  MemoryShare share() const {
    return {.node = node_, .data = base_, .bytes = size_, .bound = bound_};
  }

  // Gives the memory of bytes [begin, begin + count) back to the system, as far as they are whole
  // pages. The content of these bytes is undefined afterwards. Writing to them takes memory again.
  // Throws std::system_error if the system keeps the memory, e.g. because it is locked.
  void GiveBack(size_t begin, size_t count) const {
    const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    const int64_t first = RoundUp(static_cast<int64_t>(begin), page);
    const int64_t end = static_cast<int64_t>(begin + count) / page * page;
    if (first < end && madvise(base_ + first, end - first, MADV_DONTNEED) != 0) {
      throw std::system_error(errno, std::generic_category(), "cannot give memory back");
    }
  }

 private:
  void Map() {
    const bool huge = size_ >= kHugePage;
    const size_t granule = huge ? kHugePage : size_t{4096};
    const size_t wanted = static_cast<size_t>(RoundUp(static_cast<int64_t>(size_), granule));
    const size_t reserved = huge ? wanted + kHugePage : wanted;
    void* memory =
        mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* start = static_cast<std::byte*>(memory);
    if (huge) {  // cut both ends off so that the rest starts on a huge page
      const size_t misaligned = reinterpret_cast<uintptr_t>(start) % kHugePage;
      const size_t head = misaligned == 0 ? 0 : kHugePage - misaligned;
      if (head != 0) munmap(start, head);
      start += head;
      if (const size_t tail = reserved - head - wanted; tail != 0) munmap(start + wanted, tail);
#ifdef MADV_HUGEPAGE
      madvise(start, wanted, MADV_HUGEPAGE);  // a hint: failure costs speed, not correctness
#endif
    }
    base_ = start;
    mapped_ = wanted;
  }

  std::byte* base_ = nullptr;
  size_t mapped_ = 0;
  size_t size_ = 0;
  int node_ = kAnyNode;
  bool bound_ = false;
};

}  // namespace cpumoe
