// Experts are written to a host's memory, while calls run.
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpp/engine_test_util.h"
#include "cpp/test_matrix.h"
#include "engine/pending_call.h"
#include "formats/mxfp4.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

// Sizes with several steps for two threads: 2.4 MB.
const LayerSpec kSpec = {.experts = 2, .hidden = 2048, .intermediate = 768};

std::shared_ptr<Runtime> TwoThreads() { return Runtime::Create({.node = {.threads = 2}}); }

// A layer, its weights, and memory for one of its experts in two shards.
struct ExportCase {
  EngineCase engine{{.tokens = 2}, kSpec};
  TestLayer weights{"mxfp4", kSpec};
  TestMatrix gate{"mxfp4", 768, 2048}, up{"mxfp4", 768, 2048}, down{"mxfp4", 2048, 768};
  std::vector<ExpertDestination> shards = {Shard(0, 256), Shard(256, 512)};

  ExpertDestination Shard(int64_t begin, int64_t count) {
    return {.gate = gate.MutableView().Rows(begin, count),
            .up = up.MutableView().Rows(begin, count),
            .down = down.MutableView().Columns<Mxfp4>(begin, count),
            .intermediate_begin = begin};
  }
  bool Holds(int64_t expert) const {
    return gate == weights.Matrix(expert, 0) && up == weights.Matrix(expert, 1) &&
           down == weights.Matrix(expert, 2);
  }
};

TEST(EngineExport, ExpertsAreWrittenWhileCallsRun) {
  ExportCase test;
  const auto runtime = TwoThreads();
  const Call call(runtime, test.engine.layer(), test.engine.Options());
  std::atomic<bool> stop{false};
  std::atomic<int> calls{0};
  std::thread caller([&] {
    Bytes output = test.engine.Output();
    while (!stop) {
      call.Execute(test.engine.Tensors(output));
      ++calls;
    }
    EXPECT_EQ(output, test.engine.expected());
  });
  for (int i = 0; i < 20 || calls < 2; ++i) {
    const int64_t expert = i % 2;
    if (i % 4 < 2) {
      test.engine.layer()->Unpack(*runtime, expert, test.shards);
    } else {
      PendingCall(Layer::SubmitUnpack(test.engine.layer(), *runtime, expert, test.shards)).Wait();
    }
    EXPECT_TRUE(test.Holds(expert)) << i;
  }
  stop = true;
  caller.join();
}

TEST(EngineExport, AnEvictedExpertIsAnErrorAndLaterOnesAreWritten) {
  ExportCase test;
  const auto runtime = TwoThreads();
  const auto& layer = test.engine.layer();
  layer->Evict(0);
  constexpr char kAbsent[] = "expert 0 has no weights to export; pack it first";
  EXPECT_EQ(MessageOf([&] { layer->Unpack(*runtime, 0, test.shards); }), kAbsent);
  const auto failed = Layer::SubmitUnpack(layer, *runtime, 0, test.shards);
  const auto written = Layer::SubmitUnpack(layer, *runtime, 1, test.shards);
  written->Wait();
  EXPECT_TRUE(test.Holds(1));
  EXPECT_EQ(MessageOf([&] { failed->Wait(); }), kAbsent);
}

TEST(EngineExport, WhatDoesNotFitIsRefusedAtOnce) {
  ExportCase test;
  const auto runtime = TwoThreads();
  const auto& layer = test.engine.layer();
  EXPECT_EQ(MessageOf([&] { Layer::SubmitUnpack(layer, *runtime, 2, test.shards); }),
            "expert 2 is not one of the layer's 2");
  test.shards[1].intermediate_begin = 512;
  EXPECT_EQ(
      MessageOf([&] { Layer::SubmitUnpack(layer, *runtime, 1, test.shards); }),
      "mxfp4: intermediate features to export must be whole groups of 32 within [0, 768), got "
      "[512, 1024)");
  runtime->Close();
  EXPECT_EQ(MessageOf([&] { Layer::SubmitUnpack(layer, *runtime, 1, {}); }),
            "this Runtime is closed; create a new one");
}

TEST(EngineExport, AJobKeepsItsLayerAndItsRuntime) {
  std::shared_ptr<Completion> written;
  ExportCase memory;
  {
    const EngineCase engine({.tokens = 2}, kSpec);
    written = Layer::SubmitUnpack(engine.layer(), *TwoThreads(), 1, memory.shards);
  }
  written->Wait();
  EXPECT_TRUE(memory.Holds(1));
}

}  // namespace
}  // namespace cpumoe
