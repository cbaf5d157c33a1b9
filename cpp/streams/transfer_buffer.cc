#include "streams/transfer_buffer.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <new>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/bits.h"
#include "threading/adaptive_wait.h"
#include "threading/futex.h"

namespace cpumoe {
namespace {

constexpr int64_t kLine = AlignedBuffer::kCacheLine;
constexpr std::chrono::microseconds kSpin{30};

constexpr int64_t kHead = 2 * kLine;  // the two words
constexpr int64_t kRanges = 4;

}  // namespace

TransferLayout::TransferLayout(int64_t hidden_size, const Call::Options& options, int64_t tokens) {
  end = kHead;
  const auto place = [&](int64_t token_bytes) {
    const Range range = {end, tokens * token_bytes};
    end += RoundUp(range.bytes, kLine);
    return range;
  };
  hidden_states = place(hidden_size * ByteSize(options.input_dtype));
  ids = place(options.top_k * (options.ids_are_64_bit ? 8 : 4));
  weights = place(options.top_k * static_cast<int64_t>(sizeof(float)));
  output = place(hidden_size * ByteSize(options.output_dtype));
}

int64_t TransferLayout::BufferBytes(int64_t hidden_size, const Call::Options& options,
                                    int64_t tokens) {
  const TransferLayout one(hidden_size, options, 1);
  const int64_t of_token =
      one.hidden_states.bytes + one.ids.bytes + one.weights.bytes + one.output.bytes;
  return kHead + kRanges * (kLine - 1) + tokens * of_token;
}

int64_t TransferLayout::TokensIn(int64_t buffer_bytes, int64_t hidden_size,
                                 const Call::Options& options) {
  const int64_t none = BufferBytes(hidden_size, options, 0);
  const int64_t of_token = BufferBytes(hidden_size, options, 1) - none;
  return std::max(int64_t{0}, buffer_bytes - none) / of_token;
}

TransferBuffer::TransferBuffer(std::shared_ptr<StreamDriver> driver, int64_t bytes)
    : driver_(std::move(driver)),
      bytes_(bytes),
      memory_(driver_->AllocateHost(std::max(bytes, kHead))),
      done_(new (memory_) std::atomic<uint32_t>(kSet)),
      idle_(new (memory_ + kLine) std::atomic<uint32_t>(kSet)) {}

TransferBuffer::~TransferBuffer() { driver_->FreeHost(memory_); }

void SetValue(std::atomic<uint32_t>& word, uint32_t value) noexcept {
  word.store(value);
  FutexWake(word, std::numeric_limits<int>::max());
}

void AwaitValue(std::atomic<uint32_t>& word, uint32_t value) noexcept {
  AdaptiveWait wait(kSpin, /*crowded=*/false);
  uint32_t seen = value;
  wait.Wait([&] { return (seen = word.load()) == value; }, [&] { FutexWait(word, seen); });
}

}  // namespace cpumoe
