#include "streams/bridge.h"

#include <atomic>
#include <new>
#include <stdexcept>
#include <utility>

#include "base/check.h"

namespace cpumoe {

Bridge::Bridge(std::shared_ptr<StreamDriver> driver, const Lane::Options& lanes)
    : driver_(std::move(driver)), options_(lanes) {
  Require(lanes.buffer_bytes > 0, "buffer_bytes: expected 1 or more, got ", lanes.buffer_bytes);
  Require(lanes.captured_bytes > 0, "captured_bytes: expected 1 or more, got ",
          lanes.captured_bytes);
}

Bridge::~Bridge() {
  if (Synchronize()) return;
  KeepForever(std::make_shared<decltype(lanes_)>(std::move(lanes_)));
}

Lane& Bridge::LaneOf(StreamHandle stream) {
  fork_guard_.ThrowIfForked("Bridge");
  const std::lock_guard lock(mutex_);
  if (const auto found = lanes_.find(stream); found != lanes_.end()) return *found->second;
  if (driver_->CaptureId(stream).has_value()) {
    throw std::runtime_error(
        "submit: a stream's first call needs memory, which cannot be allocated during a capture; "
        "make a call on this stream, or call prepare, before the capture begins");
  }
  auto lane = std::make_unique<Lane>(driver_, stream, options_, running_, captured_);
  return *lanes_.emplace(stream, std::move(lane)).first->second;
}

void Bridge::Abandon(const StreamWork& work) noexcept {
  const std::lock_guard lock(mutex_);
  for (const auto& [stream, lane] : lanes_) lane->Abandon(work);
}

void KeepForever(std::shared_ptr<void> object) noexcept {
  struct Kept {
    std::shared_ptr<void> object;
    Kept* next;
  };
  // A list without a mutex, because a forked child keeps objects, too. Leak checkers can see it.
  static std::atomic<Kept*> last{nullptr};
  Kept* const kept = new (std::nothrow) Kept{std::move(object), last.load()};
  while (kept != nullptr && !last.compare_exchange_weak(kept->next, kept)) {
  }
}

}  // namespace cpumoe
