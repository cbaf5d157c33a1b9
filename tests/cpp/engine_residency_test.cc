// Which experts a layer holds: packing, masks, giving memory back, while calls run.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpp/engine_test_util.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;
using Mask = std::vector<uint8_t>;

std::shared_ptr<Runtime> TwoThreads() { return Runtime::Create({.node = {.threads = 2}}); }

int64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

TEST(EngineResidency, EvictingGivesTheMemoryOfHalfALayerBack) {
  const EngineCase engine({}, {.hidden = 1024, .intermediate = 1024});
  const auto bytes = static_cast<int64_t>(engine.layer()->nbytes());
  const int64_t before = ResidentBytes();
  for (const int64_t expert : {1, 2}) engine.layer()->Evict(expert);
  EXPECT_GE(before - ResidentBytes(), bytes / 2 * 95 / 100);
}

TEST(EngineResidency, TheLayersMaskAppliesToCallsWithoutAMask) {
  EngineCase engine;
  const Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  const Call::Tensors tensors = engine.Tensors(output);
  const Mask all = {1, 1, 1, 1}, none = {0, 0, 0, 0};
  engine.layer()->SetMask(all.data());
  call.Execute(tensors);
  EXPECT_EQ(output, Bytes(output.size(), std::byte{0}));
  Call::Options options = engine.Options();
  options.mask = none.data();
  Call(TwoThreads(), engine.layer(), options).Execute(tensors);
  EXPECT_EQ(output, engine.expected());
  engine.layer()->SetMask(nullptr);
  output = engine.Output();
  call.Execute(engine.Tensors(output));
  EXPECT_EQ(output, engine.expected());
}

TEST(EngineResidency, AMaskThatNeedsAnAbsentExpertIsRefused) {
  const EngineCase engine;
  Layer& layer = *engine.layer();
  const Mask old = {0, 1, 0, 1}, bad = {0, 0, 0, 1};
  layer.SetMask(old.data());
  layer.EvictMasked();
  EXPECT_EQ(layer.packed(), (Mask{1, 0, 1, 0}));
  EXPECT_EQ(layer.packed_bytes(), layer.nbytes() / 2);
  for (const uint8_t* mask : {bad.data(), static_cast<const uint8_t*>(nullptr)}) {
    EXPECT_EQ(MessageOf([&] { layer.SetMask(mask); }),
              "mask: expert 1 has no weights and is not masked; pack it first");
  }
  layer.EvictMasked();  // by the old mask
  EXPECT_EQ(layer.packed(), (Mask{1, 0, 1, 0}));
}

TEST(EngineResidency, WithoutAMaskNothingIsEvicted) {
  const EngineCase engine;
  engine.layer()->EvictMasked();
  EXPECT_EQ(engine.layer()->packed(), (Mask{1, 1, 1, 1}));
}

TEST(EngineResidency, AnExpertIsKeptAsLongAsAReplicaIsNotMasked) {
  const LayerSpec spec{.experts = 3};
  const TestLayer weights("mxfp4", spec);
  MoeConfig config = weights.config();
  config.num_experts = 4;
  config.copy_of = {0, 1, 0, 2};
  const auto layer = Layer::Create(EngineCase().layer()->isa(), "test", "mxfp4", config);
  const auto runtime = TwoThreads();
  const std::vector<int64_t> experts = {2, 1, 3};
  const std::vector<ExpertSource> sources = {weights.Source(0), weights.Source(1),
                                             weights.Source(2)};
  layer->Pack(*runtime, experts, sources);
  EXPECT_EQ(layer->packed_bytes(), layer->nbytes());
  const Mask first = {1, 1, 0, 0}, both = {1, 0, 1, 0};
  layer->SetMask(first.data());
  layer->EvictMasked();
  EXPECT_EQ(layer->packed(), (Mask{1, 0, 1, 1}));
  EXPECT_EQ(layer->packed_bytes(), layer->nbytes() / 3 * 2);
  layer->Pack(*runtime, 1, std::vector<ExpertSource>{weights.Source(1)});
  layer->SetMask(both.data());
  layer->EvictMasked();
  EXPECT_EQ(layer->packed(), (Mask{0, 1, 0, 1}));
}

TEST(EngineResidency, AnExpertThatIsNamedTwiceIsRefused) {
  const LayerSpec spec;
  const TestLayer weights("mxfp4", spec);
  const EngineCase engine({}, spec);
  const auto runtime = TwoThreads();
  const std::vector<ExpertSource> sources = {weights.Source(0), weights.Source(1)};
  EXPECT_EQ(MessageOf([&] { engine.layer()->Pack(*runtime, std::vector<int64_t>{2, 2}, sources); }),
            "experts: expected each expert once, got 2 or its replica twice");
  EXPECT_EQ(MessageOf([&] { engine.layer()->Pack(*runtime, std::vector<int64_t>{2}, sources); }),
            "experts: expected one index for each of the 2 sources, got 1");
  EXPECT_EQ(MessageOf([&] { engine.layer()->Pack(*runtime, 3, sources); }),
            "expert 4 is not one of the layer's 4");
}

// Packing takes an expert's weights away for a while, on another runtime than the calls'.
TEST(EngineResidency, ACallNeverSeesAnExpertThatIsHalfPacked) {
  const LayerSpec spec;
  const TestLayer weights("mxfp4", spec);
  EngineCase engine({.tokens = 2}, spec);
  for (int64_t& id : engine.batch().ids) id %= 3;  // expert 3 is evicted meanwhile
  const Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  const Call::Tensors tensors = engine.Tensors(output);
  call.Execute(tensors);
  const Bytes expected = output;
  std::atomic<bool> stop{false};
  std::atomic<int> packings{0};
  std::thread packer([&] {
    const auto runtime = Runtime::Create({});
    const std::vector<ExpertSource> sources = {weights.Source(0), weights.Source(1)};
    while (!stop) {
      engine.layer()->Pack(*runtime, 0, sources);
      engine.layer()->Evict(3);
      ++packings;
    }
  });
  for (int i = 0; i < 100 || packings < 2; ++i) {
    call.Execute(tensors);
    EXPECT_EQ(output, expected);
  }
  stop = true;
  packer.join();
}

// Calls on several runtimes overlap all the time. A change must get its turn, and each call must
// see one of the two masks with all weights that it needs.
TEST(EngineResidency, CallsSeeTheLayerBeforeOrAfterAChange) {
  const LayerSpec spec;
  const TestLayer weights("mxfp4", spec);
  EngineCase engine({.tokens = 3, .top_k = 4}, spec);
  Layer& layer = *engine.layer();
  const Mask masks[] = {{1, 1, 0, 0}, {0, 0, 1, 1}};
  Bytes expected[2];
  for (int i = 0; i < 2; ++i) {
    layer.SetMask(masks[i].data());
    expected[i] = engine.Output();
    Call(TwoThreads(), engine.layer(), engine.Options()).Execute(engine.Tensors(expected[i]));
  }
  ASSERT_NE(expected[0], expected[1]);

  const Call::Options options = engine.Options();
  constexpr int kCallers = 4;
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0};
  std::atomic<int64_t> calls{0};
  std::vector<Bytes> outputs(kCallers, engine.Output());
  std::vector<Call::Tensors> tensors;
  for (Bytes& output : outputs) tensors.push_back(engine.Tensors(output));
  std::vector<std::thread> callers;
  for (int t = 0; t < kCallers; ++t) {
    callers.emplace_back([&, t] {
      const Call call(TwoThreads(), engine.layer(), options);
      while (!stop) {
        if (t % 2 == 0) {
          call.Execute(tensors[t]);
        } else {
          call.Submit(tensors[t])->Wait();
        }
        if (outputs[t] != expected[0] && outputs[t] != expected[1]) ++torn;
        ++calls;
      }
    });
  }
  const auto runtime = TwoThreads();
  for (int change = 0; change < 40; ++change) {
    const int64_t seen = calls;
    while (calls == seen) std::this_thread::yield();  // calls are made between all changes
    const int next = change % 2;
    const int64_t first = next == 0 ? 2 : 0;
    layer.Pack(*runtime, first,
               std::vector<ExpertSource>{weights.Source(first), weights.Source(first + 1)});
    layer.SetMask(masks[next].data());
    layer.EvictMasked();
  }
  stop = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(torn, 0);
}

}  // namespace
}  // namespace cpumoe
