#include "streams/host_driver.h"

#include <cstring>
#include <new>

#include "base/aligned_buffer.h"

namespace cpumoe {
namespace {

constexpr std::align_val_t kAlignment{AlignedBuffer::kCacheLine};

}  // namespace

std::byte* HostDriver::AllocateHost(size_t bytes) {
  return static_cast<std::byte*>(operator new(bytes, kAlignment));
}

void HostDriver::FreeHost(std::byte* memory) noexcept { operator delete(memory, kAlignment); }

void HostDriver::CopyToHost(StreamHandle, void* host, const void* device, size_t bytes) {
  std::memcpy(host, device, bytes);
}

void HostDriver::CopyToDevice(StreamHandle, void* device, const void* host, size_t bytes) {
  std::memcpy(device, host, bytes);
}

}  // namespace cpumoe
