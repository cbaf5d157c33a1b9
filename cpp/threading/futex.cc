#include "threading/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ctime>

namespace cpumoe {
namespace {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) &&
                  std::atomic<uint32_t>::is_always_lock_free,
              "the kernel reads the word through the atomic's address");

uint32_t* Address(std::atomic<uint32_t>& word) { return reinterpret_cast<uint32_t*>(&word); }

}  // namespace

void FutexWait(std::atomic<uint32_t>& word, uint32_t expected, std::chrono::nanoseconds timeout) {
  timespec limit{};
  const timespec* limit_or_none = nullptr;
  if (timeout != std::chrono::nanoseconds::max()) {
    const auto seconds = std::chrono::floor<std::chrono::seconds>(timeout);
    limit.tv_sec = static_cast<time_t>(seconds.count());
    limit.tv_nsec = static_cast<long>((timeout - seconds).count());
    limit_or_none = &limit;
  }
  syscall(SYS_futex, Address(word), FUTEX_WAIT_PRIVATE, expected, limit_or_none, nullptr, 0);
}

void FutexWake(std::atomic<uint32_t>& word, int max_threads) {
  syscall(SYS_futex, Address(word), FUTEX_WAKE_PRIVATE, max_threads, nullptr, nullptr, 0);
}

}  // namespace cpumoe
