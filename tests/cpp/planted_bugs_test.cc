// The fake driver and the checks below find bugs that a bridge could have. Each bug is planted
// between the bridge and its driver.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "cpp/stream_test_util.h"

namespace cpumoe {
namespace {

// Hands everything on.
class Relay : public StreamDriver {
 public:
  explicit Relay(std::shared_ptr<StreamDriver> to) : to_(std::move(to)) {}

  std::optional<uint64_t> CaptureId(StreamHandle stream) override { return to_->CaptureId(stream); }
  std::byte* AllocateHost(size_t bytes) override { return to_->AllocateHost(bytes); }
  void FreeHost(std::byte* memory) noexcept override { to_->FreeHost(memory); }
  void CopyToHost(StreamHandle stream, void* host, const void* device, size_t bytes) override {
    to_->CopyToHost(stream, host, device, bytes);
  }
  void CopyToDevice(StreamHandle stream, void* device, const void* host, size_t bytes) override {
    to_->CopyToDevice(stream, device, host, bytes);
  }
  void Launch(StreamHandle stream, HostFunction function, void* data) override {
    to_->Launch(stream, function, data);
  }
  bool WaitForValue(StreamHandle stream, const std::atomic<uint32_t>& word,
                    uint32_t value) override {
    return to_->WaitForValue(stream, word, value);
  }
  bool Synchronize() noexcept override { return to_->Synchronize(); }

 protected:
  const std::shared_ptr<StreamDriver> to_;
};

class NoWait final : public Relay {
 public:
  using Relay::Relay;
  bool WaitForValue(StreamHandle, const std::atomic<uint32_t>&, uint32_t) override { return true; }
};

class AllocatesUnderCapture final : public Relay {
 public:
  using Relay::Relay;
  void CopyToHost(StreamHandle stream, void* host, const void* device, size_t bytes) override {
    try {
      to_->FreeHost(to_->AllocateHost(64));
    } catch (const std::runtime_error&) {  // NOLINT(bugprone-empty-catch)
      // A driver that refuses is not enough: the test must notice.
    }
    Relay::CopyToHost(stream, host, device, bytes);
  }
};

class CudaInHostFunction final : public Relay {
 public:
  using Relay::Relay;
  void Launch(StreamHandle stream, HostFunction function, void* data) override {
    Relay::Launch(stream, function, data);
    Relay::Launch(
        stream, [](void* self) noexcept { static_cast<Relay*>(self)->Synchronize(); }, this);
  }
};

// Each buffer begins with the word that a job sets. It stays set while the job runs.
class FlagNotReset final : public Relay {
 public:
  using Relay::Relay;
  std::byte* AllocateHost(size_t bytes) override {
    buffers_.push_back(Relay::AllocateHost(bytes));
    return buffers_.back();
  }
  void Launch(StreamHandle stream, HostFunction function, void* data) override {
    Relay::Launch(stream, function, data);
    Relay::Launch(stream, &SetAll, this);
  }

 private:
  static void SetAll(void* self) noexcept {
    for (std::byte* buffer : static_cast<FlagNotReset*>(self)->buffers_) {
      reinterpret_cast<std::atomic<uint32_t>*>(buffer)->store(TransferBuffer::kSet);
    }
  }
  std::vector<std::byte*> buffers_;
};

// What a graph needs of a captured call is gone after its first run.
class CapturedAsEager final : public Relay {
 public:
  using Relay::Relay;
  std::optional<uint64_t> CaptureId(StreamHandle) override { return std::nullopt; }
};

class PageableCopies final : public Relay {
 public:
  using Relay::Relay;
  std::byte* AllocateHost(size_t bytes) override { return new std::byte[bytes]; }
  void FreeHost(std::byte* memory) noexcept override { delete[] memory; }
};

class FreesWithoutWaiting final : public Relay {
 public:
  using Relay::Relay;
  bool Synchronize() noexcept override { return true; }
};

class OutputBeforeWait final : public Relay {
 public:
  using Relay::Relay;
  bool WaitForValue(StreamHandle stream, const std::atomic<uint32_t>& word,
                    uint32_t value) override {
    held_ = [=, this, &word] { Relay::WaitForValue(stream, word, value); };
    return true;
  }
  void CopyToDevice(StreamHandle stream, void* device, const void* host, size_t bytes) override {
    Relay::CopyToDevice(stream, device, host, bytes);
    if (held_) std::exchange(held_, nullptr)();
  }

 private:
  std::function<void()> held_;
};

// A layer's calls and replays of its calls, which are checked.
class Checked {
 public:
  explicit Checked(const std::function<std::shared_ptr<StreamDriver>(TestDevice&)>& driver)
      : bridge_(std::make_shared<Bridge>(driver(*device_), layer_.Buffers(8))),
        call_(std::make_unique<StreamCall>(
            bridge_, runtime_, layer_.layer(),
            StreamCall::Options{.call = layer_.Options(layer_.MakeBatch(1))})) {
    bridge_->Prepare(stream_);
    device_->BeginCapture(stream_);
    for (int i = 0; i < kCaptured; ++i) {
      DelayJob();
      Call(captured_);
    }
    graph_ = device_->EndCapture(stream_);
  }

  // Returns how many outputs are wrong.
  int64_t Round(uint64_t seed) {
    const Batch replayed = layer_.MakeBatch(seed), made = layer_.MakeBatch(100 + seed);
    captured_.Set(replayed);
    eager_.Set(made);
    device_->Replay(graph_, stream_);
    DelayJob();
    Call(eager_);
    device_->Synchronize(stream_);
    return (captured_.Output() == layer_.Expected(replayed) ? 0 : 1) +
           (eager_.Output() == layer_.Expected(made) ? 0 : 1);
  }

  // Returns how many captured calls have left nothing that lives as long as their layer. Memory
  // that is freed too early may hold the right values all the same.
  int64_t Lost() const { return kCaptured - call_->captured_plans(); }

  // The stream is late, so that nothing of the call has run when its owner is gone.
  void DestroyAtOnce() {
    const auto sleep = [](void*) noexcept {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    };
    device_->driver()->Launch(stream_, sleep, nullptr);
    Call(eager_);
    call_.reset();
    bridge_.reset();
    device_->Synchronize(stream_);
  }

 private:
  static constexpr int kCaptured = 2;  // calls in the graph

  void Call(const DeviceBatch& batch) {
    call_->Submit(stream_, batch.tensors());
    call_->Sync(stream_);
  }
  // Delays the next job in the stream's order, so that a stream that does not wait for it runs
  // ahead of it.
  void DelayJob() {
    const auto delay = [](void* runtime) noexcept {
      static_cast<Runtime*>(runtime)->Submit(
          [](Node&) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); });
    };
    device_->driver()->Launch(stream_, delay, runtime_.get());
  }

  const std::unique_ptr<CudaDevice> device_ = MakeCudaDevice();
  const StreamHandle stream_ = device_->NewStream();
  const StreamCase layer_;
  const std::shared_ptr<Runtime> runtime_ = Runtime::Create({.node = {.threads = 2}});
  std::shared_ptr<Bridge> bridge_;
  std::unique_ptr<StreamCall> call_;
  DeviceBatch captured_{*device_, layer_.MakeBatch(1), layer_.hidden_size()};
  DeviceBatch eager_{*device_, layer_.MakeBatch(1), layer_.hidden_size()};
  void* graph_ = nullptr;
};

// Counts wrong outputs, violations and exceptions.
template <class Driver>
int64_t Faults() {
  alarm(60);  // a hang is found, too
  fake::Reset();
  fake::Delay(3, 100);
  int64_t faults = 0;
  try {
    Checked checked([](TestDevice& device) { return std::make_shared<Driver>(device.driver()); });
    for (uint64_t seed = 0; seed < 10; ++seed) faults += checked.Round(seed);
    faults += checked.Lost();
    checked.DestroyAtOnce();
  } catch (const std::exception&) {
    ++faults;
  }
  alarm(0);
  return faults + fake::Violations();
}

// A bug may also corrupt memory or hang, so it lives in a process of its own, whose exit a
// sanitizer may change to a failure.
template <class Driver>
class PlantedBugDeathTest : public testing::Test {};

using Bugs = testing::Types<NoWait, AllocatesUnderCapture, CudaInHostFunction, FlagNotReset,
                            CapturedAsEager, PageableCopies, FreesWithoutWaiting, OutputBeforeWait>;
TYPED_TEST_SUITE(PlantedBugDeathTest, Bugs);

bool Found(int status) { return !WIFEXITED(status) || WEXITSTATUS(status) != 0; }

TYPED_TEST(PlantedBugDeathTest, IsFound) {
  if (!fake::Loaded()) GTEST_SKIP() << "a real driver does not look for bugs";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::exit(Faults<TypeParam>() == 0 ? 0 : 1), Found, "");
}

TEST(PlantedBug, WithoutABugThereAreNoFaults) { EXPECT_EQ(Faults<Relay>(), 0); }

}  // namespace
}  // namespace cpumoe
