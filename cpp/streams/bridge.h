// The bridge between a host's streams and the CPU: what the calls of a model's layers share.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "streams/lane.h"
#include "streams/stream_driver.h"
#include "streams/stream_work.h"
#include "threading/os_thread.h"

namespace cpumoe {

class Bridge {
 public:
  // Every stream that is used gets buffers of the sizes in `lanes`. Throws std::invalid_argument.
  Bridge(std::shared_ptr<StreamDriver> driver, const Lane::Options& lanes);
  // All jobs have ended. Leaks the buffers if operations that use them may still be queued.
  ~Bridge();
  Bridge(const Bridge&) = delete;
  Bridge& operator=(const Bridge&) = delete;

  // Makes the buffers of `stream`, unless it has them. A stream's first call does the same, but
  // memory cannot be allocated during a capture. Throws std::runtime_error.
  void Prepare(StreamHandle stream) { LaneOf(stream); }

  // The lane of `stream`, which lives as long as the bridge. Throws what Prepare throws.
  Lane& LaneOf(StreamHandle stream);

  // Forgets the calls of `work` that nobody has fetched.
  void Abandon(const StreamWork& work) noexcept;

  // Returns when all that is queued on streams has run. Returns false if nobody can tell: the
  // device failed, a capture is under way, or the process was forked.
  bool Synchronize() noexcept { return !fork_guard_.forked() && driver_->Synchronize(); }

 private:
  const ForkGuard fork_guard_;
  const std::shared_ptr<StreamDriver> driver_;
  const Lane::Options options_;
  Handover running_, captured_;
  std::mutex mutex_;  // guards lanes_
  std::map<StreamHandle, std::unique_ptr<Lane>> lanes_;
};

// Keeps an object for the life of the process, because something may still use it.
void KeepForever(std::shared_ptr<void> object) noexcept;

}  // namespace cpumoe
