// Page-locked memory through which a piece of a call goes from a stream to the CPU and back.
//
//   | done | idle | hidden states | ids | weights | output |      each on cache lines of its own
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "engine/call.h"
#include "streams/stream_driver.h"

namespace cpumoe {

// Where the tensors of `tokens` tokens lie in a buffer, in bytes. Rows are dense.
struct TransferLayout {
  TransferLayout(int64_t hidden_size, const Call::Options& options, int64_t tokens);

  // The bytes of a buffer for up to `tokens` tokens, and the most tokens that fit in such a buffer.
  static int64_t BufferBytes(int64_t hidden_size, const Call::Options& options, int64_t tokens);
  static int64_t TokensIn(int64_t buffer_bytes, int64_t hidden_size, const Call::Options& options);

  struct Range {
    int64_t begin;
    int64_t bytes;
  };
  Range hidden_states, ids, weights, output;
  int64_t end;
};

class TransferBuffer {
 public:
  TransferBuffer(std::shared_ptr<StreamDriver> driver, int64_t bytes);
  ~TransferBuffer();
  TransferBuffer(const TransferBuffer&) = delete;
  TransferBuffer& operator=(const TransferBuffer&) = delete;

  int64_t bytes() const { return bytes_; }
  std::byte* At(const TransferLayout::Range& range) const { return memory_ + range.begin; }

  // Two words for which streams wait until they are kSet. `done`: the output is complete. `idle`:
  // the job has read all that it will. Jobs that read nothing after `done` leave `idle` set.
  static constexpr uint32_t kUnset = 0, kSet = 1;
  std::atomic<uint32_t>& done() const { return *done_; }
  std::atomic<uint32_t>& idle() const { return *idle_; }

 private:
  const std::shared_ptr<StreamDriver> driver_;
  const int64_t bytes_;
  std::byte* const memory_;
  std::atomic<uint32_t>* const done_;  // in memory_
  std::atomic<uint32_t>* const idle_;
};

// Sets a word to `value` and wakes who waits for it. As soon as the word has the value, its owner
// may be gone: nothing but the address is used afterwards.
void SetValue(std::atomic<uint32_t>& word, uint32_t value) noexcept;

// Polls for a short time, then sleeps until `word` is `value`. Whoever changes the word must wake
// its waiters.
void AwaitValue(std::atomic<uint32_t>& word, uint32_t value) noexcept;

}  // namespace cpumoe
