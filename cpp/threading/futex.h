// Parking on a 32-bit word. std::atomic::wait has no time limit, which Completion::WaitFor needs.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace cpumoe {

// Sleeps while word == expected, until FutexWake or `timeout`. It may return early, so check the
// word and call again.
void FutexWait(std::atomic<uint32_t>& word, uint32_t expected,
               std::chrono::nanoseconds timeout = std::chrono::nanoseconds::max());

void FutexWake(std::atomic<uint32_t>& word, int max_threads);

}  // namespace cpumoe
