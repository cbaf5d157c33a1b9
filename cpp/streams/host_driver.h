// Streams without a GPU: an operation runs on the calling thread before the function returns.
#pragma once

#include "streams/stream_driver.h"

namespace cpumoe {

// "Device" memory is ordinary memory. Any number names a stream.
class HostDriver final : public StreamDriver {
 public:
  std::optional<uint64_t> CaptureId(StreamHandle) override { return std::nullopt; }
  std::byte* AllocateHost(size_t bytes) override;
  void FreeHost(std::byte* memory) noexcept override;
  void CopyToHost(StreamHandle stream, void* host, const void* device, size_t bytes) override;
  void CopyToDevice(StreamHandle stream, void* device, const void* host, size_t bytes) override;
  void Launch(StreamHandle, HostFunction function, void* data) override { function(data); }
  bool WaitForValue(StreamHandle, const std::atomic<uint32_t>&, uint32_t) override { return false; }
  bool Synchronize() noexcept override { return true; }
};

}  // namespace cpumoe
