// The inside of the fake driver: memory, streams, and what it observes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda/cuda_api.h"

namespace fake_cuda {

using Operation = std::function<void()>;

// Runs operations one after the other on a thread of its own.
class Worker {
 public:
  Worker();
  ~Worker();  // runs what is queued
  void Push(Operation operation);
  void AwaitIdle();

 private:
  void Loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> queue_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

// What tests set and ask.
class Observer {
 public:
  void Reset();
  void Violate(const std::string& text);
  int64_t violations();
  const char* first_violation();
  void Fail(const std::string& function, int nth, CUresult error);
  void Delay(uint64_t seed, int microseconds);

  // Notes a call of `function`; returns the error that the call shall return.
  CUresult Enter(const char* function);
  // Waits as long as an operation shall.
  void Pause();

  std::atomic<bool> waits_for_values{true};
  std::atomic<bool> broken{false};

 private:
  struct Failure {
    int countdown;
    CUresult error;
  };
  std::mutex mutex_;
  int64_t violations_ = 0;
  std::string first_;
  std::map<std::string, Failure> failures_;
  std::mt19937_64 random_;
  std::atomic<int> delay_{0};
};

// Allocations. The host cannot read or write device memory through its address.
class Memory {
 public:
  CUdeviceptr AllocateDevice(size_t bytes);
  bool FreeDevice(CUdeviceptr address);
  void* AllocateHost(size_t bytes);
  bool FreeHost(void* address);
  int64_t host_allocations();

  struct Place {
    std::byte* bytes = nullptr;  // through which the fake reaches it; null: not allocated
    bool is_device = false;
  };
  Place Find(CUdeviceptr address, size_t bytes);

 private:
  struct Block {
    size_t bytes;
    std::byte* alias;
    bool is_device;
  };
  std::mutex mutex_;
  std::map<CUdeviceptr, Block> blocks_;
};

Observer& observer();
Memory& memory();
// The thread that runs the host functions of all streams.
Worker& callbacks();

}  // namespace fake_cuda
