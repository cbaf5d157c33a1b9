// Memory and code for the emulator's tests.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cpumoe::emulator {

// Two pages below 4 GiB, for 32-bit addresses. The second page cannot be accessed.
class Arena {
 public:
  static constexpr size_t kPage = 4096;
  Arena() {
    void* pages = mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    begin_ = static_cast<uint8_t*>(pages);
    mprotect(begin_ + kPage, kPage, PROT_NONE);
  }
  ~Arena() { munmap(begin_, 2 * kPage); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  uint8_t* end() { return begin_ + kPage; }

 private:
  uint8_t* begin_;
};

// Runs the bytes of one instruction, which lie in a page of their own, and returns.
inline void Execute(const std::vector<uint8_t>& bytes) {
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::memcpy(page, bytes.data(), bytes.size());
  static_cast<uint8_t*>(page)[bytes.size()] = 0xC3;  // ret
  mprotect(page, 4096, PROT_READ | PROT_EXEC);
  reinterpret_cast<void (*)()>(page)();
}

}  // namespace cpumoe::emulator
