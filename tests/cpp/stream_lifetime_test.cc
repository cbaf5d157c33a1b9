// Calls on streams that end early: destruction in every order, forks, exits, failures of the
// device.
#include <gtest/gtest.h>
#include <malloc.h>

#include <cstdlib>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpp/forked_child.h"
#include "cpp/stream_test_util.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

// How often tests that look for growth repeat a call. tests/full.sh asks for more.
int Repetitions() {
  const char* const text = std::getenv("CPUMOE_TEST_STREAM_CALLS");
  return text == nullptr ? 2000 : std::atoi(text);
}

class StreamLifetimeTest : public StreamTest {
 protected:
  StreamLifetimeTest() {
    device = MakeCudaDevice();
    stream = device->NewStream();
    allocations = fake::HostAllocations();
    runtime = Runtime::Create({.node = {.threads = 2}});
    bridge = std::make_shared<Bridge>(device->driver(), layer.Buffers(8));
    call = MakeCall();
    on_device = std::make_unique<DeviceBatch>(*device, batch, layer.hidden_size());
  }

  std::unique_ptr<StreamCall> MakeCall() {
    return std::make_unique<StreamCall>(bridge, runtime, layer.layer(),
                                        StreamCall::Options{.call = layer.Options(batch)});
  }
  void Submit() { call->Submit(stream, on_device->tensors()); }
  void Sync() { call->Sync(stream); }
  Bytes Expected() { return layer.Expected(batch); }

  // Occupies the runtime's driver until the result is set.
  std::promise<void> HoldDriver() {
    std::promise<void> gate;
    runtime->Submit([open = gate.get_future().share()](Node&) { open.wait(); });
    return gate;
  }

  std::unique_ptr<CudaDevice> device;
  StreamHandle stream;
  int64_t allocations = 0;  // without the bridge
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(3);
  std::shared_ptr<Runtime> runtime;
  std::shared_ptr<Bridge> bridge;
  std::unique_ptr<StreamCall> call;
  std::unique_ptr<DeviceBatch> on_device;
};

TEST_F(StreamLifetimeTest, PageLockedMemoryIsFreedInEveryOrderOfDestruction) {
  for (const bool sync : {false, true}) {
    for (int first = 0; first < 3; ++first) {
      fake::Delay(first, 200);
      runtime = Runtime::Create({.node = {.threads = 2}});
      bridge = std::make_shared<Bridge>(device->driver(), layer.Buffers(8));
      call = MakeCall();
      const std::weak_ptr<Runtime> watched = runtime;
      Submit();
      if (sync) Sync();
      // The handles are dropped while the work is still queued.
      if (first == 0) runtime.reset();
      if (first == 1) bridge.reset();
      call.reset();
      bridge.reset();
      runtime.reset();
      EXPECT_EQ(fake::HostAllocations(), allocations);
      while (!watched.expired()) std::this_thread::yield();  // the driver's last job holds it
      device->Synchronize(stream);
      if (sync) {
        EXPECT_EQ(on_device->Output(), Expected());
      }
    }
  }
}

// The call's job waits for the runtime's driver while the call's owner destroys it.
TEST_F(StreamLifetimeTest, DestroyingACallWaitsForItsJob) {
  std::promise<void> gate = HoldDriver();
  Submit();
  const std::future<void> destroyed = std::async(std::launch::async, [&] { call.reset(); });
  EXPECT_EQ(destroyed.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
  gate.set_value();
  destroyed.wait();
}

TEST_F(StreamLifetimeTest, ACallThatNobodyFetchedLeavesItsBufferToOthers) {
  for (int i = 0; i < 5; ++i) {
    Submit();
    call = MakeCall();
  }
  for (int i = 0; i < 3; ++i) {
    Submit();
    Sync();
  }
  device->Synchronize(stream);
  EXPECT_EQ(on_device->Output(), Expected());
}

TEST_F(StreamLifetimeTest, CallsThatAreDestroyedDuringACaptureKeepWhatMayBeInUse) {
  auto other = MakeCall();
  Submit();
  Sync();
  device->BeginCapture(stream);
  other.reset();
  call.reset();
  bridge.reset();
  device->EndCapture(stream);
  device->Synchronize(stream);
  EXPECT_EQ(on_device->Output(), Expected());
  if (fake::Loaded()) {
    EXPECT_GT(fake::HostAllocations(), allocations);
  }
}

TEST_F(StreamLifetimeTest, AFailedDeviceRaisesErrorsAndHoldsNothingUp) {
  if (!fake::Loaded()) GTEST_SKIP() << "a real device does not fail on request";
  std::promise<void> gate = HoldDriver();
  Submit();
  Sync();
  fake::Break();
  EXPECT_EQ(MessageOf([&] { Submit(); }),
            "CUDA: cuStreamGetCaptureInfo failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)");
  call.reset();
  bridge.reset();
  gate.set_value();
  fake::Reset();
  device->Synchronize(stream);
}

// AddressSanitizer finds what such jobs would leave behind.
TEST_F(StreamLifetimeTest, AFailedDeviceNeverStartsWhatIsQueued) {
  if (!fake::Loaded()) GTEST_SKIP() << "a real device does not fail on request";
  std::promise<void> gate;
  std::shared_future<void> open = gate.get_future().share();
  const StreamDriver::HostFunction wait = [](void* future) noexcept {
    static_cast<std::shared_future<void>*>(future)->wait();
  };
  device->driver()->Launch(stream, wait, &open);
  Submit();
  Submit();
  fake::Break();
  gate.set_value();
  call.reset();
  bridge.reset();
  fake::Reset();
  device->Synchronize(stream);
}

TEST_F(StreamLifetimeTest, ManyCallsLeaveNothingBehind) {
  const auto run = [&](int times) {
    for (int i = 0; i < times; ++i) {
      Submit();
      Sync();
      if (i % 50 == 49) device->Synchronize(stream);
    }
    device->Synchronize(stream);
  };
  run(100);
  const int64_t locked = fake::HostAllocations();
  const size_t heap = mallinfo2().uordblks;
  run(Repetitions());
  EXPECT_EQ(fake::HostAllocations(), locked);
  EXPECT_EQ(call->captured_plans(), 0);
  // Heap of other threads is not counted exactly. A leak would be at least 50 bytes per call.
  EXPECT_LT(mallinfo2().uordblks, heap + 20 * Repetitions());
  EXPECT_EQ(on_device->Output(), Expected());
}

TEST_F(StreamLifetimeTest, ManyReplaysLeaveNothingBehind) {
  bridge->Prepare(stream);
  device->BeginCapture(stream);
  Submit();
  Sync();
  void* const graph = device->EndCapture(stream);
  const auto run = [&](int times) {
    for (int i = 0; i < times; ++i) {
      device->Replay(graph, stream);
      if (i % 50 == 49) device->Synchronize(stream);
    }
    device->Synchronize(stream);
  };
  run(100);
  const size_t heap = mallinfo2().uordblks;
  run(Repetitions());
  EXPECT_EQ(call->captured_plans(), 1);
  EXPECT_LT(mallinfo2().uordblks, heap + 20 * Repetitions());
  EXPECT_EQ(on_device->Output(), Expected());
}

constexpr char kForked[] =
    "Bridge: its threads belong to the parent process and do not exist after fork(); create a new "
    "Runtime in the child process";

TEST_F(StreamLifetimeTest, AForkedChildGetsErrorsAndCanDropTheHandles) {
  // Uses the parent's handles; returns which use did not get its error, 0 for none.
  const auto use = [&] {
    if (MessageOf([&] { Submit(); }) != kForked) return 1;
    if (MessageOf([&] { Sync(); }) != kForked) return 2;
    if (MessageOf([&] { bridge->Prepare(7); }) != kForked) return 3;
    call.reset();
    bridge.reset();
    runtime.reset();
    return 0;
  };
  EXPECT_EQ(ResultInChild(use), 0);
  std::promise<void> gate = HoldDriver();
  Submit();
  EXPECT_EQ(ResultInChild(use), 0);
  Sync();
  EXPECT_EQ(ResultInChild(use), 0);
  gate.set_value();
  device->Synchronize(stream);
  EXPECT_EQ(on_device->Output(), Expected());
}

using StreamDeathTest = StreamLifetimeTest;

// Static objects are destroyed while jobs run and functions are queued.
TEST_F(StreamDeathTest, TheProcessMayExitDuringACall) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        fake::Delay(1, 200);
        for (int i = 0; i < 20; ++i) {
          Submit();
          Sync();
        }
        std::exit(0);
      },
      testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace cpumoe
