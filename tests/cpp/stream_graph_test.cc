// Calls on streams that are captured into graphs.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "cpp/stream_test_util.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

// Two layers with two batches each, whose calls are captured.
class StreamGraphTest : public StreamTest, public testing::WithParamInterface<bool> {
 protected:
  StreamGraphTest() {
    fake::Delay(2, 20);
    device = MakeCudaDevice();
    Lane::Options buffers = second.Buffers(8);
    buffers.wait_by_function = !GetParam();
    bridge = std::make_shared<Bridge>(device->driver(), buffers);
    one = std::make_unique<StreamCall>(bridge, runtime, first.layer(), OptionsOf(first));
    two = std::make_unique<StreamCall>(bridge, runtime, second.layer(), OptionsOf(second));
    stream = device->NewStream();
    other_stream = device->NewStream();
  }

  static StreamCall::Options OptionsOf(const StreamCase& layer) {
    return {.call = layer.Options(layer.MakeBatch(1))};
  }

  DeviceBatch OnDevice(const StreamCase& layer, const Batch& batch) {
    return DeviceBatch(*device, batch, layer.hidden_size());
  }

  // Captures a call of both layers.
  void* Capture(const DeviceBatch& a, const DeviceBatch& b) {
    bridge->Prepare(stream);
    device->BeginCapture(stream);
    one->Submit(stream, a.tensors());
    one->Sync(stream);
    two->Submit(stream, b.tensors());
    two->Sync(stream);
    return device->EndCapture(stream);
  }

  std::unique_ptr<CudaDevice> device;
  const StreamCase first{{.dtype = DType::kBf16}},
      second{{.tokens = 3}, {.hidden = 96, .batch_invariant = true}};
  const std::shared_ptr<Runtime> runtime = Runtime::Create({.node = {.threads = 2}});
  std::shared_ptr<Bridge> bridge;
  std::unique_ptr<StreamCall> one, two;
  StreamHandle stream, other_stream;
};

INSTANTIATE_TEST_SUITE_P(Waits, StreamGraphTest, testing::Bool(), [](const auto& info) {
  return std::string(info.param ? "Values" : "HostFunctions");
});

TEST_P(StreamGraphTest, ReplaysComputeWithTheInputsOfTheirTime) {
  DeviceBatch a = OnDevice(first, first.MakeBatch(1)), b = OnDevice(second, second.MakeBatch(1));
  void* const graph = Capture(a, b);
  const int64_t allocations = fake::HostAllocations();
  for (uint64_t i = 0; i < 20; ++i) {
    const Batch batch = first.MakeBatch(i), other = second.MakeBatch(i);
    a.Set(batch);
    b.Set(other);
    const StreamHandle on = i % 3 == 0 ? stream : other_stream;
    device->Replay(graph, on);
    device->Synchronize(on);
    EXPECT_EQ(a.Output(), first.Expected(batch)) << i;
    EXPECT_EQ(b.Output(), second.Expected(other)) << i;
  }
  EXPECT_EQ(one->captured_plans(), 1);
  EXPECT_EQ(two->captured_plans(), 1);
  EXPECT_EQ(fake::HostAllocations(), allocations);
}

TEST_P(StreamGraphTest, ReplaysAndCallsMayFollowEachOtherWithoutWaiting) {
  const Batch batch = first.MakeBatch(1), other = second.MakeBatch(1);
  const DeviceBatch a = OnDevice(first, batch), b = OnDevice(second, other);
  void* const graph = Capture(a, b);
  std::vector<Batch> batches;
  std::vector<DeviceBatch> eager;
  for (uint64_t i = 0; i < 30; ++i) {
    batches.push_back(first.MakeBatch(i, 1 + static_cast<int64_t>(i) % 8));
    eager.push_back(OnDevice(first, batches.back()));
  }
  for (const DeviceBatch& call : eager) {
    one->Submit(stream, call.tensors());
    device->Replay(graph, stream);
    one->Sync(stream);
  }
  device->Synchronize(stream);
  for (size_t i = 0; i < eager.size(); ++i) {
    EXPECT_EQ(eager[i].Output(), first.Expected(batches[i])) << i;
  }
  EXPECT_EQ(a.Output(), first.Expected(batch));
  EXPECT_EQ(b.Output(), second.Expected(other));
}

TEST_P(StreamGraphTest, GraphsOfSeveralSizesShareBuffers) {
  std::vector<Batch> batches;
  std::vector<DeviceBatch> on_device;
  std::vector<void*> graphs;
  bridge->Prepare(stream);
  for (int64_t tokens : {1, 2, 4, 8, 13}) {  // 13 are made in two pieces
    batches.push_back(second.MakeBatch(tokens, tokens));
    on_device.push_back(OnDevice(second, batches.back()));
    device->BeginCapture(stream);
    two->Submit(stream, on_device.back().tensors());
    two->Sync(stream);
    graphs.push_back(device->EndCapture(stream));
  }
  EXPECT_EQ(two->captured_plans(), 6);
  for (int i = 0; i < 3; ++i) {
    for (void* const graph : graphs) device->Replay(graph, other_stream);
  }
  device->Synchronize(other_stream);
  for (size_t i = 0; i < graphs.size(); ++i) {
    EXPECT_EQ(on_device[i].Output(), second.Expected(batches[i])) << i;
  }
}

TEST_P(StreamGraphTest, APreparedStreamNeedsNoCallBeforeACapture) {
  const DeviceBatch a = OnDevice(first, first.MakeBatch(1));
  device->BeginCapture(stream);
  EXPECT_EQ(MessageOf([&] { one->Submit(stream, a.tensors()); }),
            "submit: a stream's first call needs memory, which cannot be allocated during a "
            "capture; make a call on this stream, or call prepare, before the capture begins");
  device->EndCapture(stream);
  bridge->Prepare(stream);
  device->BeginCapture(stream);
  one->Submit(stream, a.tensors());
  one->Sync(stream);
  device->EndCapture(stream);
}

TEST_P(StreamGraphTest, ACaptureThatStoppedHalfwayDoesNotHoldUpTheNextOne) {
  const Batch batch = first.MakeBatch(1), other = second.MakeBatch(1);
  const DeviceBatch a = OnDevice(first, batch), b = OnDevice(second, other);
  bridge->Prepare(stream);
  device->BeginCapture(stream);
  one->Submit(stream, a.tensors());
  two->Submit(stream, b.tensors());
  device->EndCapture(stream);
  EXPECT_THROW(one->Sync(stream), std::runtime_error);
  void* const graph = Capture(a, b);
  for (int i = 0; i < 2; ++i) device->Replay(graph, stream);
  device->Synchronize(stream);
  EXPECT_EQ(a.Output(), first.Expected(batch));
  EXPECT_EQ(b.Output(), second.Expected(other));
}

TEST_P(StreamGraphTest, AReplayThatFailsGivesNaNAndTheNextOneWorks) {
  const Batch good = first.MakeBatch(1);
  Batch bad = first.MakeBatch(2);
  bad.ids[0] = 77;
  DeviceBatch a = OnDevice(first, good);
  const DeviceBatch b = OnDevice(second, second.MakeBatch(1));
  void* const graph = Capture(a, b);
  for (int i = 0; i < 3; ++i) {
    a.Set(bad);
    device->Replay(graph, stream);
    device->Synchronize(stream);
    EXPECT_EQ(a.Output(), Bytes(a.output_bytes(), std::byte{0xff}));
    EXPECT_THROW(one->ThrowError(), std::runtime_error);
    one->ThrowError();
    a.Set(good);
    device->Replay(graph, stream);
    device->Synchronize(stream);
    EXPECT_EQ(a.Output(), first.Expected(good));
  }
}

TEST_P(StreamGraphTest, ReplaysReadTheMaskOfTheirTime) {
  Batch batch = first.MakeBatch(1);
  batch.mask = {1, 1, 1, 1};
  const DeviceBatch a = OnDevice(first, batch), b = OnDevice(second, second.MakeBatch(1));
  one = std::make_unique<StreamCall>(bridge, runtime, first.layer(),
                                     StreamCall::Options{.call = first.Options(batch)});
  void* const graph = Capture(a, b);
  for (const int masked : {1, 0, 1}) {
    batch.mask.assign(4, static_cast<uint8_t>(masked));
    device->Replay(graph, stream);
    device->Synchronize(stream);
    EXPECT_EQ(a.Output(), first.Expected(batch)) << masked;
  }
}

TEST_P(StreamGraphTest, ARefusalDuringACaptureIsRaised) {
  if (!fake::Loaded()) GTEST_SKIP() << "a real driver refuses nothing on request";
  const Batch batch = first.MakeBatch(1), other = second.MakeBatch(1);
  const DeviceBatch a = OnDevice(first, batch), b = OnDevice(second, other);
  bridge->Prepare(stream);
  for (const int nth : {1, 2, 3}) {
    device->BeginCapture(stream);
    fake::Fail("cuMemcpyAsync", nth, 900);
    EXPECT_EQ(MessageOf([&] { one->Submit(stream, a.tensors()); }),
              "CUDA: cuMemcpyAsync failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)");
    device->EndCapture(stream);
  }
  void* const graph = Capture(a, b);
  device->Replay(graph, stream);
  device->Synchronize(stream);
  EXPECT_EQ(a.Output(), first.Expected(batch));
}

}  // namespace
}  // namespace cpumoe
