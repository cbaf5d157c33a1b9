// What the bridge needs of whoever runs a host's streams.
//
// A stream runs the operations that are queued on it one after the other: copies, functions on the
// CPU, waiting. A driver may record the operations into a graph ("capture") and run them later, any
// number of times.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace cpumoe {

// A stream as the host names it, e.g. a cudaStream_t.
using StreamHandle = uintptr_t;

// Any thread may call. Functions that are not noexcept throw std::runtime_error if the driver
// refuses, and have then queued nothing.
class StreamDriver {
 public:
  using HostFunction = void (*)(void* data) noexcept;

  virtual ~StreamDriver() = default;

  // Identifies the capture into which operations on `stream` are recorded now; none: they run.
  virtual std::optional<uint64_t> CaptureId(StreamHandle stream) = 0;

  // Memory that operations of all streams may use. Not during a capture.
  virtual std::byte* AllocateHost(size_t bytes) = 0;
  virtual void FreeHost(std::byte* memory) noexcept = 0;

  // Operations. `host` must lie in memory of AllocateHost.
  virtual void CopyToHost(StreamHandle stream, void* host, const void* device, size_t bytes) = 0;
  virtual void CopyToDevice(StreamHandle stream, void* device, const void* host, size_t bytes) = 0;
  // Runs function(data). The function must not call the driver and must not wait for the stream.
  virtual void Launch(StreamHandle stream, HostFunction function, void* data) = 0;
  // Waits until `word`, in memory of AllocateHost, is `value`. Returns false if the driver has no
  // such operation. The first wait must not be made during a capture, because a refused attempt
  // could end the capture.
  virtual bool WaitForValue(StreamHandle stream, const std::atomic<uint32_t>& word,
                            uint32_t value) = 0;

  // Returns when all operations of all streams have run. Returns false if the driver cannot tell,
  // e.g. after an error of the device, or during a capture.
  virtual bool Synchronize() noexcept = 0;
};

}  // namespace cpumoe
