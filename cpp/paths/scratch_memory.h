// Scratch memory of calls. It grows to the largest call and is then reused, so later calls allocate
// nothing.
#pragma once

#include <cstddef>
#include <vector>

#include "base/aligned_buffer.h"

namespace cpumoe {

// Memory that a request returns is uninitialised, and valid until the next request for that buffer.
class ScratchMemory {
 public:
  // For staged activations.
  std::byte* Activations(size_t bytes) { return Grow(activations_, bytes); }

  // Makes Scratch(t) return at least `bytes` for each of `threads` threads.
  void ReserveScratch(int threads, size_t bytes) {
    if (scratch_.size() < static_cast<size_t>(threads)) scratch_.resize(threads);
    for (AlignedBuffer& buffer : scratch_) Grow(buffer, bytes);
  }
  std::byte* Scratch(int thread) const { return scratch_[thread].data(); }

 protected:
  static std::byte* Grow(AlignedBuffer& buffer, size_t bytes) {
    if (buffer.size() < bytes) {
      buffer = AlignedBuffer();  // frees the old buffer before the new one is allocated
      buffer = AlignedBuffer(bytes);
    }
    return buffer.data();
  }

 private:
  AlignedBuffer activations_;
  std::vector<AlignedBuffer> scratch_;
};

}  // namespace cpumoe
