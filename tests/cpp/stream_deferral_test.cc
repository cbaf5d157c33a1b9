// Deferral: experts of a layer that the next call of the stream adds to its output.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "cpp/stream_test_util.h"
#include "streams/deferral.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

constexpr int64_t kExperts = 8, kTopK = 4;

TEST(ExpertSplit, AnExpertIsComputedNowIfAnyTokenNeedsIt) {
  std::vector<int32_t> ids = {0, 1, 2, 3, 4, 3, -1, 6};
  const std::vector<float> weights = {.1f, .4f, .2f, .3f, .5f, .1f, .9f, .2f};
  ExpertSplit split;
  EXPECT_TRUE(split.Move(ids.data(), weights.data(), 2, kTopK, 2, kExperts));
  EXPECT_EQ(ids, (std::vector<int32_t>{-1, 1, -1, 3, 4, 3, -1, -1}));
  const auto* const later = static_cast<const int32_t*>(split.later_ids());
  EXPECT_EQ(std::vector(later, later + 8), (std::vector<int32_t>{0, -1, 2, -1, -1, -1, -1, 6}));
  EXPECT_FALSE(split.Move(ids.data(), weights.data(), 2, kTopK, 0, kExperts));
  EXPECT_TRUE(split.Move(ids.data(), weights.data(), 2, kTopK, kTopK, kExperts));
  EXPECT_EQ(ids, std::vector<int32_t>(8, -1));
}

TEST(ExpertSplit, TheFirstOfEqualWeightsIsGreaterAndUnknownIdsStay) {
  std::vector<int64_t> ids = {5, 4, 77, 2};
  const std::vector<float> weights(kTopK, .25f);
  ExpertSplit split;
  EXPECT_TRUE(split.Move(ids.data(), weights.data(), 1, kTopK, 2, kExperts));
  EXPECT_EQ(ids, (std::vector<int64_t>{5, 4, 77, -1}));
  const auto* const later = static_cast<const int64_t*>(split.later_ids());
  EXPECT_EQ(std::vector(later, later + 4), (std::vector<int64_t>{-1, -1, -1, 2}));
}

// A layer whose calls defer, and the parts of its calls as plain calls give them.
class DeferringLayer {
 public:
  DeferringLayer(int64_t tokens, int64_t deferred, DType dtype)
      : case_({.tokens = tokens, .top_k = kTopK, .dtype = dtype},
              {.experts = kExperts, .batch_invariant = true}),
        deferred_(deferred) {}

  const StreamCase& layer() const { return case_; }
  StreamCall::Options Options() const {
    return {.call = case_.Options(case_.MakeBatch(1)), .deferred_experts = deferred_};
  }

  // The experts that `batch` computes now, or later, in fp32, added to `sum`.
  void AddTo(std::vector<float>& sum, Batch batch, bool later) const {
    const std::set<int64_t> now = Now(batch);
    batch.mask.resize(kExperts);
    for (int64_t e = 0; e < kExperts; ++e) batch.mask[e] = now.contains(e) == later ? 1 : 0;
    Call::Options options = case_.Options(batch);
    options.output_dtype = DType::kFp32;
    options.accumulate = true;
    const ForwardArgs args = batch.Args(sum.data());
    Call(Runtime::Create({}), case_.layer(), options)
        .Execute({.hidden_states = args.hidden_states,
                  .hidden_stride = args.hidden_stride,
                  .tokens = args.tokens,
                  .ids = args.routing.ids,
                  .weights = args.routing.weights,
                  .output = sum.data()});
  }

 private:
  std::set<int64_t> Now(const Batch& batch) const {
    std::set<int64_t> now;
    for (int64_t t = 0; t < batch.spec().tokens; ++t) {
      std::vector<int64_t> slots(kTopK);
      std::iota(slots.begin(), slots.end(), t * kTopK);
      std::ranges::sort(slots,
                        [&](int64_t a, int64_t b) { return batch.weights[a] > batch.weights[b]; });
      for (int64_t i = 0; i < kTopK - deferred_; ++i) now.insert(batch.ids[slots[i]]);
    }
    return now;
  }

  StreamCase case_;
  int64_t deferred_;
};

// Layers of one model, whose calls follow each other on a stream.
class StreamDeferralTest : public StreamTest, public testing::WithParamInterface<DType> {
 protected:
  StreamDeferralTest() {
    fake::Delay(4, 50);
    device = MakeCudaDevice();
    stream = device->NewStream();
    for (const int64_t deferred : {2, 3, 1, 0}) {
      layers.push_back(std::make_unique<DeferringLayer>(kTokens, deferred, GetParam()));
    }
    MakeCalls(kTokens);
  }

  // Not all layers of a model have experts.
  StreamCall::Options OptionsOf(size_t layer) const {
    StreamCall::Options options = layers[layer]->Options();
    options.layer_index = 3 * static_cast<int64_t>(layer);
    return options;
  }

  void MakeCalls(int64_t tokens_of_a_buffer) {
    bridge =
        std::make_shared<Bridge>(device->driver(), layers[0]->layer().Buffers(tokens_of_a_buffer));
    calls.clear();
    for (size_t i = 0; i < layers.size(); ++i) {
      calls.push_back(std::make_unique<StreamCall>(bridge, runtimes[i % runtimes.size()],
                                                   layers[i]->layer().layer(), OptionsOf(i)));
    }
  }

  static int64_t Hidden() { return LayerSpec().hidden; }

  void MakeBatches(uint64_t seed, int64_t tokens = kTokens) {
    batches.clear();
    for (const auto& layer : layers) batches.push_back(layer->layer().MakeBatch(seed++, tokens));
    if (on_device.empty()) {
      for (const Batch& batch : batches) on_device.emplace_back(*device, batch, Hidden());
    } else {
      for (size_t i = 0; i < batches.size(); ++i) on_device[i].Set(batches[i]);
    }
  }

  void Make(size_t layer) {
    calls[layer]->Submit(stream, on_device[layer].tensors());
    calls[layer]->Sync(stream);
  }

  // What the layers give one after the other, the sums of earlier ones included.
  std::vector<Bytes> Expected() {
    std::vector<Bytes> outputs;
    std::vector<float> sum(batches[0].spec().tokens * Hidden());
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i]->AddTo(sum, batches[i], false);
      outputs.push_back(Rounded(sum));
      std::ranges::fill(sum, 0.0f);
      layers[i]->AddTo(sum, batches[i], true);
    }
    return outputs;
  }

  static Bytes Rounded(const std::vector<float>& values) {
    Bytes bytes(values.size() * ByteSize(GetParam()));
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t narrow = GetParam() == DType::kBf16 ? Bf16::FromFloat(values[i]).bits
                                                         : Fp16::FromFloat(values[i]).bits;
      if (GetParam() == DType::kFp32) {
        std::memcpy(&bytes[4 * i], &values[i], 4);
      } else {
        std::memcpy(&bytes[2 * i], &narrow, 2);
      }
    }
    return bytes;
  }

  void ExpectOutputs() {
    const std::vector<Bytes> expected = Expected();
    for (size_t i = 0; i < layers.size(); ++i) EXPECT_EQ(on_device[i].Output(), expected[i]) << i;
  }

  static constexpr int64_t kTokens = 2;
  std::unique_ptr<CudaDevice> device;
  StreamHandle stream;
  std::vector<std::unique_ptr<DeferringLayer>> layers;
  std::vector<std::shared_ptr<Runtime>> runtimes = {Runtime::Create({.node = {.threads = 2}})};
  std::shared_ptr<Bridge> bridge;
  std::vector<std::unique_ptr<StreamCall>> calls;
  std::vector<Batch> batches;
  std::vector<DeviceBatch> on_device;
};

INSTANTIATE_TEST_SUITE_P(DTypes, StreamDeferralTest,
                         testing::Values(DType::kBf16, DType::kFp16, DType::kFp32),
                         [](const auto& info) {
                           return std::string(1, "bhf"[static_cast<int>(info.param)]);
                         });

TEST_P(StreamDeferralTest, TheNextCallAddsWhatWasPutOff) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    MakeBatches(seed);
    for (size_t i = 0; i < layers.size(); ++i) Make(i);
    device->Synchronize(stream);
    ExpectOutputs();
  }
}

TEST_P(StreamDeferralTest, GraphsAddTheSameSums) {
  MakeBatches(1);
  bridge->Prepare(stream);
  device->BeginCapture(stream);
  for (size_t i = 0; i < layers.size(); ++i) Make(i);
  void* const graph = device->EndCapture(stream);
  for (uint64_t seed = 0; seed < 5; ++seed) {
    MakeBatches(seed);
    for (int i = 0; i < 3; ++i) device->Replay(graph, stream);
    device->Synchronize(stream);
    ExpectOutputs();
  }
}

TEST_P(StreamDeferralTest, ACallInPiecesAddsTheSumAndDefersNothing) {
  MakeBatches(1);
  MakeCalls(1);
  for (size_t i = 0; i < layers.size(); ++i) Make(i);
  device->Synchronize(stream);
  for (size_t i = 0; i < layers.size(); ++i) {
    EXPECT_EQ(on_device[i].Output(), layers[i]->layer().Expected(batches[i])) << i;
  }
}

// sglang-kt gives each layer a stream of its own, and orders the streams itself.
TEST_P(StreamDeferralTest, SumsPassBetweenStreamsThatTheHostOrders) {
  for (const int threads : {0, 1}) {
    if (threads > 0) runtimes.push_back(Runtime::Create({.node = {.threads = threads}}));
    MakeBatches(1);
    MakeCalls(kTokens);
    for (size_t i = 0; i < layers.size(); ++i) {
      stream = device->NewStream();
      Make(i);
      device->Synchronize(stream);
    }
    ExpectOutputs();
  }
}

// Jobs of two runtimes may run at the same time, and would then use the sum at the same time.
TEST_P(StreamDeferralTest, LayersWithThreadsOfTheirOwnAddInOrder) {
  MakeBatches(1);
  runtimes.push_back(Runtime::Create({.node = {.threads = 1}}));
  MakeCalls(kTokens);
  bridge->Prepare(stream);
  device->BeginCapture(stream);
  for (size_t i = 0; i < layers.size(); ++i) Make(i);
  void* const graph = device->EndCapture(stream);
  for (uint64_t seed = 0; seed < 5; ++seed) {
    MakeBatches(seed);
    for (int round = 0; round < 3; ++round) {
      for (size_t i = 0; i < layers.size(); ++i) Make(i);
    }
    device->Synchronize(stream);
    ExpectOutputs();
    MakeBatches(seed);
    for (int round = 0; round < 3; ++round) device->Replay(graph, stream);
    device->Synchronize(stream);
    ExpectOutputs();
  }
}

TEST_P(StreamDeferralTest, ASumOfAPassThatEndedEarlyIsLeftOut) {
  MakeBatches(1);
  Make(0);
  Make(1);
  EXPECT_EQ(calls[1]->TakeLeftOut(), std::nullopt);
  for (size_t i = 0; i < layers.size(); ++i) Make(i);
  device->Synchronize(stream);
  ExpectOutputs();
  EXPECT_EQ(calls[0]->TakeLeftOut(), 3);
  EXPECT_EQ(calls[0]->TakeLeftOut(), std::nullopt);
  EXPECT_EQ(calls[1]->TakeLeftOut(), std::nullopt);
}

TEST_P(StreamDeferralTest, ASumOfOtherTokensIsLeftOut) {
  MakeBatches(1);
  Make(0);
  const Batch batch = layers[3]->layer().MakeBatch(7, 1);
  const DeviceBatch one(*device, batch, Hidden());
  calls[3]->Submit(stream, one.tensors());
  calls[3]->Sync(stream);
  device->Synchronize(stream);
  EXPECT_EQ(one.Output(), layers[3]->layer().Expected(batch));
  EXPECT_EQ(calls[3]->TakeLeftOut(), 0);
  for (size_t i = 0; i < layers.size(); ++i) Make(i);
  device->Synchronize(stream);
  ExpectOutputs();
}

TEST_P(StreamDeferralTest, AFailedJobDropsTheSum) {
  MakeBatches(1);
  Make(0);
  Batch bad = batches[1];
  bad.ids[0] = 77;
  const DeviceBatch bad_on_device(*device, bad, Hidden());
  calls[1]->Submit(stream, bad_on_device.tensors());
  // Sync throws the job's error if the job is faster.
  const bool thrown = MessageOf([&] { calls[1]->Sync(stream); }) != "no exception";
  device->Synchronize(stream);
  if (!thrown) {
    EXPECT_THROW(calls[1]->ThrowError(), std::runtime_error);
  }
  EXPECT_EQ(bad_on_device.Output(), Bytes(bad_on_device.output_bytes(), std::byte{0xff}));
  for (size_t i = 0; i < layers.size(); ++i) Make(i);
  device->Synchronize(stream);
  ExpectOutputs();
}

TEST_P(StreamDeferralTest, BothBuffersMayBeInUse) {
  MakeBatches(1);
  for (int i = 0; i < 10; ++i) {
    calls[0]->Submit(stream, on_device[0].tensors());
    calls[1]->Submit(stream, on_device[1].tensors());
    calls[0]->Sync(stream);
    calls[2]->Submit(stream, on_device[2].tensors());
    calls[1]->Sync(stream);
    calls[3]->Submit(stream, on_device[3].tensors());
    calls[2]->Sync(stream);
    calls[3]->Sync(stream);
  }
  device->Synchronize(stream);
  ExpectOutputs();
}

TEST_P(StreamDeferralTest, MoreThanTopKIsRefused) {
  StreamCall::Options options = layers[0]->Options();
  for (const int64_t deferred : {-1, 5}) {
    options.deferred_experts = deferred;
    const auto make = [&] { StreamCall(bridge, runtimes[0], layers[0]->layer().layer(), options); };
    EXPECT_EQ(MessageOf(make),
              "deferred_experts: expected 0 to top_k (4), got " + std::to_string(deferred));
  }
}

}  // namespace
}  // namespace cpumoe
