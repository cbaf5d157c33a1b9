#include "fake_cuda/device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <utility>

namespace fake_cuda {

Worker::Worker() : thread_([this] { Loop(); }) {}

Worker::~Worker() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Worker::Push(Operation operation) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(operation));
  }
  changed_.notify_all();
}

void Worker::AwaitIdle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return queue_.empty() && !busy_; });
}

void Worker::Loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Operation operation = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    operation();
    operation = nullptr;
    lock.lock();
    busy_ = false;
    if (queue_.empty()) changed_.notify_all();
  }
}

void Observer::Reset() {
  const std::lock_guard lock(mutex_);
  violations_ = 0;
  first_.clear();
  failures_.clear();
  delay_ = 0;
  waits_for_values = true;
  broken = false;
}

void Observer::Violate(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (violations_++ == 0) first_ = text;
}

int64_t Observer::violations() {
  const std::lock_guard lock(mutex_);
  return violations_;
}

const char* Observer::first_violation() {
  const std::lock_guard lock(mutex_);
  return first_.c_str();
}

void Observer::Fail(const std::string& function, int nth, CUresult error) {
  const std::lock_guard lock(mutex_);
  failures_[function] = {nth, error};
}

void Observer::Delay(uint64_t seed, int microseconds) {
  const std::lock_guard lock(mutex_);
  random_.seed(seed);
  delay_ = microseconds;
}

CUresult Observer::Enter(const char* function) {
  const std::lock_guard lock(mutex_);
  const auto failure = failures_.find(function);
  if (failure == failures_.end() || --failure->second.countdown > 0) return CUDA_SUCCESS;
  const CUresult error = failure->second.error;
  failures_.erase(failure);
  return error;
}

void Observer::Pause() {
  const int most = delay_;
  if (most == 0) return;
  int microseconds = 0;
  {
    const std::lock_guard lock(mutex_);
    microseconds = std::uniform_int_distribution(0, most)(random_);
  }
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

// Device memory is mapped twice: at its address without permissions, and where the fake uses it.
CUdeviceptr Memory::AllocateDevice(size_t bytes) {
  const int file = memfd_create("fake_cuda", MFD_CLOEXEC);
  if (file < 0) return 0;
  void* address = MAP_FAILED;
  void* alias = MAP_FAILED;
  if (ftruncate(file, static_cast<off_t>(bytes)) == 0) {
    address = mmap(nullptr, bytes, PROT_NONE, MAP_SHARED, file, 0);
    alias = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);
  if (address == MAP_FAILED || alias == MAP_FAILED) return 0;
  const auto key = reinterpret_cast<CUdeviceptr>(address);
  const std::lock_guard lock(mutex_);
  blocks_[key] = {bytes, static_cast<std::byte*>(alias), true};
  return key;
}

bool Memory::FreeDevice(CUdeviceptr address) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(address);
  if (found == blocks_.end() || !found->second.is_device) return false;
  munmap(reinterpret_cast<void*>(address), found->second.bytes);
  munmap(found->second.alias, found->second.bytes);
  blocks_.erase(found);
  return true;
}

void* Memory::AllocateHost(size_t bytes) {
  void* const address = operator new(bytes, std::align_val_t(4096), std::nothrow);
  if (address == nullptr) return nullptr;
  const std::lock_guard lock(mutex_);
  blocks_[reinterpret_cast<CUdeviceptr>(address)] = {bytes, static_cast<std::byte*>(address),
                                                     false};
  return address;
}

bool Memory::FreeHost(void* address) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(reinterpret_cast<CUdeviceptr>(address));
  if (found == blocks_.end() || found->second.is_device) return false;
  blocks_.erase(found);
  operator delete(address, std::align_val_t(4096));
  return true;
}

int64_t Memory::host_allocations() {
  const std::lock_guard lock(mutex_);
  return std::ranges::count_if(blocks_, [](const auto& b) { return !b.second.is_device; });
}

Memory::Place Memory::Find(CUdeviceptr address, size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return {};
  const auto& [begin, block] = *--after;
  if (address - begin > block.bytes || bytes > block.bytes - (address - begin)) return {};
  return {block.alias + (address - begin), block.is_device};
}

Observer& observer() {
  static Observer& instance = *new Observer;
  return instance;
}

Memory& memory() {
  static Memory& instance = *new Memory;
  return instance;
}

Worker& callbacks() {
  static Worker& instance = *new Worker;
  return instance;
}

}  // namespace fake_cuda
