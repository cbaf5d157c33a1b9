// Calls on streams: results, errors, refusals. Most tests run on the fake CUDA driver, with both
// ways in which a stream can wait, and on the CPU without a driver.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cpp/stream_test_util.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

enum class Kind { kValues, kHostFunctions, kNoDriver };

class StreamCallTest : public StreamTest, public testing::WithParamInterface<Kind> {
 protected:
  StreamCallTest() {
    fake::Delay(1, 20);
    if (GetParam() == Kind::kNoDriver) {
      device = MakeHostDevice();
    } else {
      device = MakeCudaDevice();
    }
    runtime = Runtime::Create({.node = {.threads = 2}});
  }

  std::shared_ptr<Bridge> MakeBridge(Lane::Options buffers) {
    buffers.wait_by_function = GetParam() == Kind::kHostFunctions;
    return std::make_shared<Bridge>(device->driver(), buffers);
  }

  // Makes a call whose output has been computed when the function returns.
  Bytes Run(StreamCall& call, StreamHandle stream, const DeviceBatch& batch) {
    call.Submit(stream, batch.tensors());
    call.Sync(stream);
    device->Synchronize(stream);
    return batch.Output();
  }

  // Makes a call with buffers for `tokens` tokens, and expects the bits of a call without a stream.
  void CheckCall(const StreamCase& layer, int64_t tokens) {
    const Batch batch = layer.MakeBatch(3);
    const DeviceBatch on_device(*device, batch, layer.hidden_size());
    StreamCall call(MakeBridge(layer.Buffers(tokens)), runtime, layer.layer(),
                    {.call = layer.Options(batch)});
    EXPECT_EQ(Run(call, device->NewStream(), on_device), layer.Expected(batch));
  }

  std::unique_ptr<TestDevice> device;
  std::shared_ptr<Runtime> runtime;
};

std::string NameOf(const testing::TestParamInfo<Kind>& info) {
  constexpr const char* kNames[] = {"Values", "HostFunctions", "NoDriver"};
  return kNames[static_cast<int>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(Devices, StreamCallTest,
                         testing::Values(Kind::kValues, Kind::kHostFunctions, Kind::kNoDriver),
                         NameOf);

TEST_P(StreamCallTest, EveryCombinationOfTypesGivesTheBitsOfACallWithoutAStream) {
  const std::vector<DType> dtypes = {DType::kBf16, DType::kFp16, DType::kFp32};
  for (const DType input : dtypes) {
    for (const DType output : dtypes) {
      for (const bool wide : {false, true}) {
        CheckCall(StreamCase({.dtype = input, .output_dtype = output, .ids_are_64_bit = wide}), 8);
      }
    }
  }
}

TEST_P(StreamCallTest, OddShapes) {
  for (const BatchSpec& spec : {BatchSpec{.tokens = 0}, BatchSpec{.tokens = 1},
                                BatchSpec{.top_k = 0}, BatchSpec{.tokens = 130, .top_k = 4}}) {
    CheckCall(StreamCase(spec), 130);
  }
}

// SGLang overwrites the ids right after it has submitted them.
TEST_P(StreamCallTest, InputsMayChangeInTheStreamsOrder) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(5);
  const DeviceBatch on_device(*device, batch, layer.hidden_size());
  StreamCall call(MakeBridge(layer.Buffers(8)), runtime, layer.layer(),
                  {.call = layer.Options(batch)});
  call.Submit(stream, on_device.tensors());
  device->Fill(stream, const_cast<void*>(on_device.tensors().ids), 0x55, on_device.id_bytes());
  call.Sync(stream);
  device->Synchronize(stream);
  EXPECT_EQ(on_device.Output(), layer.Expected(batch));
}

TEST_P(StreamCallTest, CallsMayFollowEachOtherWithoutWaiting) {
  const StreamHandle stream = device->NewStream();
  const StreamCase first, second({.tokens = 2}, {.hidden = 96});
  const auto bridge = MakeBridge(second.Buffers(8));
  StreamCall one(bridge, runtime, first.layer(), {.call = first.Options(first.MakeBatch(1))});
  StreamCall two(bridge, runtime, second.layer(), {.call = second.Options(second.MakeBatch(1))});
  std::vector<Batch> batches;
  std::vector<DeviceBatch> on_device;
  for (uint64_t i = 0; i < 40; ++i) {
    const StreamCase& layer = i % 2 == 0 ? first : second;
    batches.push_back(layer.MakeBatch(i));
    on_device.emplace_back(*device, batches.back(), layer.hidden_size());
  }
  for (size_t i = 0; i < on_device.size(); i += 2) {
    // Every other time, both calls are under way at once.
    const bool both = i % 4 == 0;
    one.Submit(stream, on_device[i].tensors());
    if (!both) one.Sync(stream);
    two.Submit(stream, on_device[i + 1].tensors());
    two.Sync(stream);
    if (both) one.Sync(stream);
  }
  device->Synchronize(stream);
  for (size_t i = 0; i < on_device.size(); ++i) {
    const StreamCase& layer = i % 2 == 0 ? first : second;
    EXPECT_EQ(on_device[i].Output(), layer.Expected(batches[i])) << i;
  }
}

// The threads have no current context.
TEST_P(StreamCallTest, TwoStreamsOfTwoThreads) {
  const StreamCase layer;
  const auto bridge = MakeBridge(layer.Buffers(8));
  StreamCall shared(bridge, runtime, layer.layer(), {.call = layer.Options(layer.MakeBatch(1))});
  std::vector<StreamHandle> streams = {device->NewStream(), device->NewStream()};
  std::vector<std::vector<Batch>> batches(2);
  std::vector<std::vector<DeviceBatch>> on_device(2);
  for (uint64_t i = 0; i < 60; ++i) {
    batches[i % 2].push_back(layer.MakeBatch(i));
    on_device[i % 2].emplace_back(*device, batches[i % 2].back(), layer.hidden_size());
  }
  std::vector<std::thread> threads;
  for (size_t t = 0; t < streams.size(); ++t) {
    threads.emplace_back([&, t] {
      for (const DeviceBatch& batch : on_device[t]) {
        shared.Submit(streams[t], batch.tensors());
        shared.Sync(streams[t]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t t = 0; t < streams.size(); ++t) {
    device->Synchronize(streams[t]);
    for (size_t i = 0; i < batches[t].size(); ++i) {
      EXPECT_EQ(on_device[t][i].Output(), layer.Expected(batches[t][i]));
    }
  }
}

TEST_P(StreamCallTest, CallsLargerThanABufferAreMadeInPieces) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer({}, {.batch_invariant = true});
  const StreamCase other;
  const auto bridge = MakeBridge(layer.Buffers(3));
  StreamCall call(bridge, runtime, layer.layer(), {.call = layer.Options(layer.MakeBatch(1))});
  StreamCall waiting(bridge, runtime, other.layer(), {.call = other.Options(other.MakeBatch(1))});
  const Batch small = other.MakeBatch(1, 2);
  const DeviceBatch small_on_device(*device, small, other.hidden_size());
  for (const int64_t tokens : {3, 4, 6, 7, 20}) {
    const Batch batch = layer.MakeBatch(tokens, tokens);
    DeviceBatch on_device(*device, batch, layer.hidden_size());
    EXPECT_EQ(Run(call, stream, on_device), layer.Expected(batch)) << tokens;
    // Another layer's call may hold one of the two buffers meanwhile.
    on_device.Set(batch);
    waiting.Submit(stream, small_on_device.tensors());
    EXPECT_EQ(Run(call, stream, on_device), layer.Expected(batch)) << tokens;
    waiting.Sync(stream);
  }
  device->Synchronize(stream);
  EXPECT_EQ(small_on_device.Output(), other.Expected(small));
}

TEST_P(StreamCallTest, ACallHasTheMaskOfItsSubmit) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  Batch batch = layer.MakeBatch(6);
  const Bytes expected = layer.Expected(batch);
  batch.mask = {1, 1, 1, 1};
  DeviceBatch on_device(*device, batch, layer.hidden_size());
  StreamCall call(MakeBridge(layer.Buffers(8)), runtime, layer.layer(),
                  {.call = layer.Options(batch)});
  call.Submit(stream, on_device.tensors());
  batch.mask.assign(4, 0);
  call.Sync(stream);
  device->Synchronize(stream);
  EXPECT_EQ(on_device.Output(), Bytes(expected.size(), std::byte{0}));
  EXPECT_EQ(Run(call, stream, on_device), expected);
}

TEST_P(StreamCallTest, UnknownIdsAreSkippedOnRequest) {
  const StreamHandle stream = device->NewStream();
  for (const bool wide : {false, true}) {
    const StreamCase layer({.ids_are_64_bit = wide});
    Batch batch = layer.MakeBatch(7);
    batch.ids[0] = batch.ids[5] = -1;
    const Bytes expected = layer.Expected(batch);
    batch.ids[0] = -7;
    batch.ids[5] = 77;
    const DeviceBatch on_device(*device, batch, layer.hidden_size());
    StreamCall call(MakeBridge(layer.Buffers(8)), runtime, layer.layer(),
                    {.call = layer.Options(batch), .skip_unknown_ids = true});
    EXPECT_EQ(Run(call, stream, on_device), expected);
  }
}

TEST_P(StreamCallTest, AJobThatFailsGivesNaNAndItsErrorOnce) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  const Batch good = layer.MakeBatch(8);
  Batch bad = layer.MakeBatch(9);
  bad.ids[3] = 77;
  const DeviceBatch good_on_device(*device, good, layer.hidden_size());
  const DeviceBatch bad_on_device(*device, bad, layer.hidden_size());
  StreamCall call(MakeBridge(layer.Buffers(8)), runtime, layer.layer(),
                  {.call = layer.Options(good)});
  const std::string error =
      "a call of 5 tokens has failed, and its output is NaN: topk_ids[1, 1]: expert ids must be in "
      "[0, 4), or -1 or 4 for an expert to skip; got 77";
  for (int i = 0; i < 2; ++i) {
    call.Submit(stream, bad_on_device.tensors());
    std::string message = MessageOf([&] { call.Sync(stream); });
    device->Synchronize(stream);
    // With a driver, Sync may have returned before the job ran.
    if (message == "no exception") {
      message = MessageOf([&] { call.Submit(stream, good_on_device.tensors()); });
    }
    EXPECT_EQ(message, error);
    EXPECT_EQ(bad_on_device.Output(), Bytes(bad_on_device.output_bytes(), std::byte{0xff}));
    EXPECT_EQ(Run(call, stream, good_on_device), layer.Expected(good));
    call.ThrowError();
  }
}

TEST_P(StreamCallTest, AClosedRuntimeGivesNaNAndItsError) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(8);
  const DeviceBatch on_device(*device, batch, layer.hidden_size());
  StreamCall call(MakeBridge(layer.Buffers(8)), runtime, layer.layer(),
                  {.call = layer.Options(batch)});
  runtime->Close();
  call.Submit(stream, on_device.tensors());
  std::string message = MessageOf([&] { call.Sync(stream); });
  device->Synchronize(stream);
  if (message == "no exception") message = MessageOf([&] { call.ThrowError(); });
  EXPECT_EQ(
      message,
      "a call of 5 tokens has failed, and its output is NaN: this Runtime is closed; create a "
      "new one");
  EXPECT_EQ(on_device.Output(), Bytes(on_device.output_bytes(), std::byte{0xff}));
}

TEST_P(StreamCallTest, WrongUsesAreRefusedAndChangeNothing) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(8);
  const DeviceBatch on_device(*device, batch, layer.hidden_size());
  const auto bridge = MakeBridge(layer.Buffers(8));
  const StreamCall::Options options = {.call = layer.Options(batch)};
  StreamCall first(bridge, runtime, layer.layer(), options);
  const auto submit = [&](StreamCall& call, Call::Tensors tensors) {
    return MessageOf([&] { call.Submit(stream, tensors); });
  };
  const std::string no_call =
      "sync: this layer has no call on this stream, or two layers were called after it; call "
      "submit first, on the same stream";
  EXPECT_EQ(MessageOf([&] { first.Sync(stream); }), no_call);
  Call::Tensors bad = on_device.tensors();
  bad.ids = nullptr;
  EXPECT_EQ(submit(first, bad), "ids: expected an address, got a null pointer");
  bad = on_device.tensors();
  ++bad.hidden_stride;
  EXPECT_EQ(submit(first, bad), "hidden_stride: expected 64, rows that follow each other; got 65");
  first.Submit(stream, on_device.tensors());
  EXPECT_EQ(MessageOf([&] { first.Sync(device->NewStream()); }), no_call);
  first.Sync(stream);
  StreamCall::Options accumulating = options;
  accumulating.call.accumulate = true;
  EXPECT_EQ(MessageOf([&] { StreamCall(bridge, runtime, layer.layer(), accumulating); }),
            "accumulate: a call on a stream overwrites its output");
}

// A host that an error keeps from fetching outputs can go on.
TEST_P(StreamCallTest, CallsThatWereNotFetchedAreForgottenFromTheOldestOn) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  const auto bridge = MakeBridge(layer.Buffers(8));
  const Batch batch = layer.MakeBatch(8);
  std::vector<std::unique_ptr<StreamCall>> calls;
  std::vector<std::unique_ptr<DeviceBatch>> on_device;
  for (int i = 0; i < 3; ++i) {
    calls.push_back(std::make_unique<StreamCall>(bridge, runtime, layer.layer(),
                                                 StreamCall::Options{layer.Options(batch)}));
    on_device.push_back(std::make_unique<DeviceBatch>(*device, batch, layer.hidden_size()));
  }
  const auto submit = [&](int i) { calls[i]->Submit(stream, on_device[i]->tensors()); };
  const Bytes untouched = on_device[0]->Output(), expected = layer.Expected(batch);
  for (int i = 0; i < 3; ++i) submit(0);
  submit(1);
  submit(2);
  EXPECT_THROW(calls[0]->Sync(stream), std::runtime_error);
  calls[2]->Sync(stream);
  calls[1]->Sync(stream);
  device->Synchronize(stream);
  EXPECT_EQ(on_device[0]->Output(), untouched);
  EXPECT_EQ(on_device[1]->Output(), expected);
  EXPECT_EQ(on_device[2]->Output(), expected);
}

TEST_P(StreamCallTest, WaitReturnsWhenTheJobHasEnded) {
  const StreamHandle stream = device->NewStream();
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(8);
  const DeviceBatch on_device(*device, batch, layer.hidden_size());
  StreamCall call(MakeBridge(layer.Buffers(8)), runtime, layer.layer(),
                  {.call = layer.Options(batch)});
  const int64_t before = layer.layer()->statistics().calls;
  call.Submit(stream, on_device.tensors());
  EXPECT_TRUE(call.Wait());
  EXPECT_EQ(layer.layer()->statistics().calls, before + 1);
}

TEST_P(StreamCallTest, BuffersThatHoldNoTokenAreRefused) {
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(8);
  const DeviceBatch on_device(*device, batch, layer.hidden_size());
  EXPECT_EQ(MessageOf([&] { MakeBridge({.buffer_bytes = 0, .captured_bytes = 1}); }),
            "buffer_bytes: expected 1 or more, got 0");
  EXPECT_EQ(MessageOf([&] { MakeBridge({.buffer_bytes = 1, .captured_bytes = -1}); }),
            "captured_bytes: expected 1 or more, got -1");
  StreamCall call(MakeBridge({.buffer_bytes = 915, .captured_bytes = 1}), runtime, layer.layer(),
                  {.call = layer.Options(batch)});
  EXPECT_EQ(MessageOf([&] { call.Submit(device->NewStream(), on_device.tensors()); }),
            "submit: a token of this layer needs a buffer of 916 bytes, but those of the bridge "
            "have 915; make the bridge with larger buffers");
}

class CudaStreamTest : public StreamTest {
 protected:
  const std::unique_ptr<CudaDevice> device = MakeCudaDevice();
  const std::shared_ptr<Runtime> runtime = Runtime::Create({.node = {.threads = 2}});
  const StreamCase layer;
  const Batch batch = layer.MakeBatch(8);
  const DeviceBatch on_device{*device, batch, layer.hidden_size()};
  const std::shared_ptr<Bridge> bridge =
      std::make_shared<Bridge>(device->driver(), layer.Buffers(8));
  StreamCall call{bridge, runtime, layer.layer(), {.call = layer.Options(batch)}};
  StreamHandle stream = device->NewStream();

  Bytes Run() {
    call.Submit(stream, on_device.tensors());
    call.Sync(stream);
    device->Synchronize(stream);
    return on_device.Output();
  }
};

TEST_F(CudaStreamTest, StreamZeroIsAStream) {
  stream = 0;
  EXPECT_EQ(Run(), layer.Expected(batch));
}

TEST_F(CudaStreamTest, ThereIsNoDriverWithoutAContext) {
  std::string message;
  std::thread([&] { message = MessageOf([&] { device->driver(); }); }).join();
  EXPECT_EQ(message,
            "CUDA: no context is current on this thread; use the GPU on this thread first, e.g. "
            "with torch.cuda.current_stream()");
}

// Each function of the driver refuses once, at each place where a call uses it.
TEST_F(CudaStreamTest, ARefusalOfTheDriverLeavesNoHalfCall) {
  if (!fake::Loaded()) GTEST_SKIP() << "a real driver refuses nothing on request";
  for (const bool values : {true, false}) {
    for (const auto& [function, nth] :
         {std::tuple("cuMemHostAlloc", 1), std::tuple("cuMemHostAlloc", 3),
          std::tuple("cuStreamGetCaptureInfo", 1), std::tuple("cuStreamGetCaptureInfo", 2),
          std::tuple("cuStreamGetCaptureInfo", 3), std::tuple("cuMemcpyAsync", 1),
          std::tuple("cuMemcpyAsync", 2), std::tuple("cuMemcpyAsync", 3),
          std::tuple("cuLaunchHostFunc", 1), std::tuple("cuStreamWaitValue32", 1)}) {
      stream = device->NewStream();
      fake::WaitValues(values);
      fake::Fail(function, nth, 999);
      const std::string message = MessageOf([&] { call.Submit(stream, on_device.tensors()); });
      if (message == "no exception") {  // then the function was not used so often
        EXPECT_EQ(std::string(function), "cuStreamGetCaptureInfo") << nth;
        fake::Fail(function, 0, 0);
        call.Sync(stream);
      } else {
        EXPECT_EQ(message, std::string("CUDA: ") + function + " failed: unknown error (999)");
        EXPECT_THROW(call.Sync(stream), std::runtime_error);
      }
      EXPECT_EQ(Run(), layer.Expected(batch)) << function << " " << nth;
    }
  }
}

TEST_F(CudaStreamTest, SyncCanBeCalledAgainAfterARefusal) {
  if (!fake::Loaded()) GTEST_SKIP() << "a real driver refuses nothing on request";
  for (const bool values : {true, false}) {
    for (const std::string function :
         {"cuStreamGetCaptureInfo", "cuStreamWaitValue32", "cuLaunchHostFunc", "cuMemcpyAsync"}) {
      if (values == (function == "cuLaunchHostFunc")) continue;
      if (!values && function == "cuStreamWaitValue32") continue;
      fake::WaitValues(values);
      stream = device->NewStream();
      call.Submit(stream, on_device.tensors());
      fake::Fail(function, 1, 2);
      EXPECT_EQ(MessageOf([&] { call.Sync(stream); }),
                "CUDA: " + function + " failed: CUDA_ERROR_OUT_OF_MEMORY (2)");
      call.Sync(stream);
      device->Synchronize(stream);
      EXPECT_EQ(on_device.Output(), layer.Expected(batch));
    }
  }
}

}  // namespace
}  // namespace cpumoe
