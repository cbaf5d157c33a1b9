// Calls of the engine: results, errors, threads.
#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstring>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpp/engine_test_util.h"
#include "engine/pending_call.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

constexpr char kBadId[] =
    "topk_ids[1, 0]: expert ids must be in [0, 4), or -1 or 4 for an expert to skip; got 77";

std::shared_ptr<Runtime> TwoThreads() { return Runtime::Create({.node = {.threads = 2}}); }

TEST(Engine, EveryWayToMakeACallGivesTheSameBits) {
  const EngineCase engine({.dtype = DType::kBf16});
  const auto runtime = TwoThreads();
  Call call(runtime, engine.layer(), engine.Options());
  Bytes executed = engine.Output(), run = executed, called = executed, submitted = executed;
  call.Execute(engine.Tensors(executed));
  call.Bind(engine.Tensors(run));
  EXPECT_TRUE(call.Run());
  call.ExecuteBound();
  EXPECT_EQ(run, engine.expected());
  call.SubmitBound(true)->Wait();
  call.Bind(engine.Tensors(called));
  void (*const function)(void*) = &Call::RunCallback;
  function(&call);
  call.Submit(engine.Tensors(submitted))->Wait();
  for (const Bytes& output : {executed, run, called, submitted}) {
    EXPECT_EQ(output, engine.expected());
  }
  EXPECT_EQ(call.TakeError(), nullptr);
}

TEST(Engine, ACallFixesDTypesAndWhetherItAdds) {
  const EngineCase engine({.dtype = DType::kBf16, .output_dtype = DType::kFp32});
  const auto runtime = TwoThreads();
  Call::Options options = engine.Options();
  options.accumulate = true;
  Bytes output(engine.expected().size(), std::byte{0});
  const Call call(runtime, engine.layer(), options);
  for (int i = 0; i < 2; ++i) call.Execute(engine.Tensors(output));
  const std::vector<double> once = Numbers(DType::kFp32, engine.expected());
  const std::vector<double> twice = Numbers(DType::kFp32, output);
  for (size_t i = 0; i < once.size(); ++i) EXPECT_EQ(twice[i], 2 * once[i]);

  options.output_dtype = DType::kBf16;
  EXPECT_EQ(MessageOf([&] { Call(runtime, engine.layer(), options); }),
            "accumulate: results can be added onto an fp32 output only");
}

TEST(Engine, ManyCallers) {
  const EngineCase engine;
  const auto runtime = TwoThreads();
  Call shared(runtime, engine.layer(), engine.Options());
  Bytes shared_output = engine.Output();
  shared.Bind(engine.Tensors(shared_output));
  constexpr int kThreads = 6;
  std::vector<Bytes> outputs(kThreads, engine.Output());
  std::vector<Call::Tensors> tensors;
  for (Bytes& output : outputs) tensors.push_back(engine.Tensors(output));
  std::atomic<int> runs{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 30; ++i) {
        if (t % 3 == 0) runs += shared.Run() ? 1 : 0;
        if (t % 3 == 1) shared.Execute(tensors[t]);
        if (t % 3 == 2) shared.Submit(tensors[t])->Wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(runs, 60);
  EXPECT_EQ(shared_output, engine.expected());
  for (int t = 0; t < kThreads; ++t) {
    if (t % 3 != 0) {
      EXPECT_EQ(outputs[t], engine.expected()) << t;
    }
  }
}

// Work in steps ends here only after a call has run in between.
TEST(Engine, CallsRunBetweenTheStepsOfLongWork) {
  const EngineCase engine;
  for (const bool callers_compute : {true, false}) {
    const auto runtime =
        Runtime::Create({.node = {.threads = 2}, .callers_compute = callers_compute});
    const Call call(runtime, engine.layer(), engine.Options());
    for (const bool submits_steps : {true, false}) {
      for (const bool submits_call : {true, false}) {
        Bytes output = engine.Output();
        std::atomic<bool> started{false}, called{false};
        std::thread caller([&] {
          while (!started) std::this_thread::yield();
          if (submits_call) {
            call.Submit(engine.Tensors(output))->Wait();
          } else {
            call.Execute(engine.Tensors(output));
          }
          called = true;
        });
        const auto step = [&](Node& /*node*/) {
          started = true;
          return !called;
        };
        if (submits_steps) {
          runtime->SubmitSteps(step)->Wait();
        } else {
          runtime->ExecuteSteps(step);
        }
        caller.join();
        EXPECT_EQ(output, engine.expected());
      }
    }
  }
}

TEST(Engine, StepsThatFailAreReportedAndLaterCallsWork) {
  const EngineCase engine;
  const auto runtime = TwoThreads();
  int steps = 0;
  const auto step = [&](Node& /*node*/) -> bool {
    if (++steps % 3 == 0) throw std::runtime_error("third");
    return true;
  };
  EXPECT_EQ(MessageOf([&] { runtime->ExecuteSteps(step); }), "third");
  EXPECT_EQ(MessageOf([&] { runtime->SubmitSteps(step)->Wait(); }), "third");
  EXPECT_EQ(steps, 6);
  Bytes output = engine.Output();
  Call(runtime, engine.layer(), engine.Options()).Execute(engine.Tensors(output));
  EXPECT_EQ(output, engine.expected());
  runtime->Close();
  EXPECT_EQ(MessageOf([&] { runtime->ExecuteSteps(step); }),
            "this Runtime is closed; create a new one");
}

// A host's thread may have a small stack, block signals and round as it likes.
TEST(Engine, ForeignThreads) {
  const EngineCase engine({.tokens = 40});
  Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  call.Bind(engine.Tensors(output));
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, 256 << 10), 0);
  pthread_t thread;
  const auto host = [](void* address) -> void* {
    std::fesetround(FE_UPWARD);
    Call::RunCallback(address);
    return std::fegetround() == FE_UPWARD ? address : nullptr;
  };
  ASSERT_EQ(pthread_create(&thread, &attributes, host, &call), 0);
  void* result = nullptr;
  pthread_join(thread, &result);
  pthread_attr_destroy(&attributes);
  EXPECT_EQ(result, &call) << "the thread's rounding mode changed";
  EXPECT_EQ(output, engine.expected());
}

TEST(Engine, ErrorsOfTasksReachTheCallerAndLaterCallsWork) {
  EngineCase engine;
  const auto runtime = TwoThreads();
  Call call(runtime, engine.layer(), engine.Options());
  Bytes output = engine.Output();
  const int64_t id = std::exchange(engine.batch().ids[2], 77);
  const Call::Tensors bad = engine.Tensors(output);
  EXPECT_EQ(MessageOf([&] { call.Execute(bad); }), kBadId);
  const auto completion = call.Submit(bad);
  EXPECT_THROW(completion->Wait(), std::out_of_range);
  call.Bind(bad);
  EXPECT_FALSE(call.Run());
  EXPECT_EQ(MessageOf(call.TakeError()), kBadId);
  engine.batch().ids[2] = id;
  call.Bind(engine.Tensors(output));
  EXPECT_TRUE(call.Run());
  EXPECT_EQ(output, engine.expected());
}

TEST(Engine, ACallKeepsItsFirstErrorUntilItIsTaken) {
  EngineCase engine;
  Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  for (const int64_t id : {77, 78, 0}) {
    engine.batch().ids[2] = id;
    call.Bind(engine.Tensors(output));
    EXPECT_EQ(call.Run(), id == 0);
  }
  EXPECT_EQ(MessageOf(call.TakeError()), kBadId);
  EXPECT_EQ(call.TakeError(), nullptr);
}

TEST(Engine, ManyThreadsFailAndErrorsAreTakenWhole) {
  EngineCase engine;
  engine.batch().ids[2] = 77;
  Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  call.Bind(engine.Tensors(output));
  std::atomic<int> taken{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        EXPECT_FALSE(call.Run());
        if (const std::exception_ptr error = call.TakeError(); error != nullptr) {
          EXPECT_EQ(MessageOf(error), kBadId);
          ++taken;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(taken, 1);
}

TEST(Engine, NullAddressesAndNegativeSizesAreRefusedAndTheBoundTensorsStay) {
  const EngineCase engine;
  Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  const Call::Tensors good = engine.Tensors(output);
  call.Bind(good);
  const auto refuse = [&](const Call::Tensors& bad, const std::string& message) {
    EXPECT_EQ(MessageOf([&] { call.Bind(bad); }), message);
    EXPECT_EQ(MessageOf([&] { call.Execute(bad); }), message);
    EXPECT_EQ(MessageOf([&] { call.Submit(bad, true); }), message);
  };
  Call::Tensors bad = good;
  bad.hidden_states = nullptr;
  refuse(bad, "hidden_states: expected an address, got a null pointer");
  (bad = good).output = nullptr;
  refuse(bad, "output: expected an address, got a null pointer");
  (bad = good).ids = nullptr;
  refuse(bad, "ids: expected an address, got a null pointer");
  (bad = good).weights = nullptr;
  refuse(bad, "weights: expected an address, got a null pointer");
  (bad = good).tokens = -1;
  refuse(bad, "tokens: expected 0 or more, got -1");
  bad.tokens = std::numeric_limits<int64_t>::max();
  refuse(bad, "tokens: expected at most 2147483648, got 9223372036854775807");
  (bad = good).hidden_stride = std::numeric_limits<int64_t>::max() / 4;
  refuse(bad, "hidden_stride: expected 0 to 57646075230342348 for 5 rows, got 2305843009213693951");
  bad.hidden_stride = -64;
  refuse(bad, "hidden_stride: expected 0 to 57646075230342348 for 5 rows, got -64");
  EXPECT_TRUE(call.Run());
  EXPECT_EQ(output, engine.expected());
}

TEST(Engine, ACallThatIsNotBoundHasNoTokens) {
  const EngineCase engine;
  Call call(TwoThreads(), engine.layer(), engine.Options());
  EXPECT_TRUE(call.Run());
  call.Submit({}, true)->Wait();
}

TEST(Engine, TheMaskIsReadAtEachRun) {
  EngineCase engine;
  Bytes output = engine.Output();
  engine.batch().mask = {1, 1, 1, 1};
  Call call(TwoThreads(), engine.layer(), engine.Options());
  call.Bind(engine.Tensors(output));
  EXPECT_TRUE(call.Run());
  EXPECT_EQ(output, Bytes(output.size(), std::byte{0}));
  std::fill(engine.batch().mask.begin(), engine.batch().mask.end(), uint8_t{0});
  EXPECT_TRUE(call.Run());
  EXPECT_EQ(output, engine.expected());
}

// The driver is held while the caller overwrites what it has submitted.
TEST(Engine, CopiedInputsMayBeOverwrittenAtOnce) {
  for (const BatchSpec& spec : {BatchSpec{}, BatchSpec{.tokens = 1}, BatchSpec{.tokens = 0},
                                BatchSpec{.top_k = 0}, BatchSpec{.dtype = DType::kBf16},
                                BatchSpec{.ids_are_64_bit = false}, BatchSpec{.row_gap = 5}}) {
    EngineCase engine(spec);
    const auto runtime = TwoThreads();
    std::promise<void> gate;
    const auto held = runtime->Submit([&](Node&) { gate.get_future().wait(); });
    const Call call(runtime, engine.layer(), engine.Options());
    Bytes output = engine.Output();
    const auto completion = call.Submit(engine.Tensors(output), true);
    for (int64_t t = 0; t < spec.tokens; ++t) engine.batch().SetHiddenState(t, 7, 1e30f);
    std::fill(engine.batch().ids.begin(), engine.batch().ids.end(), 77);
    std::fill(engine.batch().weights.begin(), engine.batch().weights.end(), 1e30f);
    engine.Tensors(output);  // overwrites 32-bit ids, too
    gate.set_value();
    completion->Wait();
    EXPECT_EQ(output, engine.expected());
  }
}

TEST(Engine, WithWaitingCallersTheDriverComputes) {
  EngineCase engine;
  const auto runtime = Runtime::Create({.node = {.threads = 1}, .callers_compute = false});
  std::thread::id first, second;
  runtime->Execute([&](Node&) { first = std::this_thread::get_id(); });
  runtime->Submit([&](Node&) { second = std::this_thread::get_id(); })->Wait();
  EXPECT_EQ(first, second);
  EXPECT_NE(first, std::this_thread::get_id());
  const Call call(runtime, engine.layer(), engine.Options());
  Bytes output = engine.Output();
  call.Execute(engine.Tensors(output));
  EXPECT_EQ(output, engine.expected());
  engine.batch().ids[2] = 77;
  EXPECT_EQ(MessageOf([&] { call.Execute(engine.Tensors(output)); }), kBadId);
}

TEST(Engine, WhatRunsOnTheDriverMayNotMakeCallsThatWaitForIt) {
  const auto runtime = Runtime::Create({.node = {.threads = 1}, .callers_compute = false});
  std::string message;
  runtime->Execute([&](Node&) { message = MessageOf([&] { runtime->Execute([](Node&) {}); }); });
  EXPECT_EQ(message, "Runtime: what runs on a runtime must not make calls on it");
  bool ran = false;
  runtime->Execute([&](Node&) { ran = true; });
  EXPECT_TRUE(ran);
}

TEST(Engine, WithoutNamedCpusAThreadThatMakesCallsDoesNotDecideWhereTheyRun) {
  const std::vector<int> usable = ProcessAffinity();
  const auto runtime = Runtime::Create({.node = {.threads = 2}, .callers_compute = false});
  bool bound = false;
  std::mutex mutex;
  std::set<std::vector<int>> seen;
  std::thread([&] {
    bound = SetAffinity(pthread_self(), {usable.front()});
    runtime->Execute([&](Node& node) {
      node.pool().For(200, [&](int64_t, int) {
        const std::lock_guard lock(mutex);
        seen.insert(ProcessAffinity());
      });
    });
  }).join();
  if (!bound) GTEST_SKIP() << "the system does not let threads choose their CPU";
  EXPECT_EQ(seen, std::set{usable});
}

// The caller's own affinity is that of a host whose main thread OpenMP has bound to one CPU.
TEST(Engine, ARuntimeComputesOnTheCpusThatItNames) {
  const std::vector<int> usable = ProcessAffinity();
  std::vector<int> cpus(usable.end() - std::min<ptrdiff_t>(2, std::ssize(usable)), usable.end());
  bool bound = false;
  std::mutex mutex;
  std::set<int> seen;
  std::thread([&] {
    bound = SetAffinity(pthread_self(), {usable.front()});
    const auto runtime =
        Runtime::Create({.node = {.threads = static_cast<int>(cpus.size()), .cpus = cpus},
                         .callers_compute = false});
    runtime->Execute([&](Node& node) {
      node.pool().For(200, [&](int64_t, int) {
        const int cpu = sched_getcpu();
        const std::lock_guard lock(mutex);
        seen.insert(cpu);
      });
    });
  }).join();
  if (!bound) GTEST_SKIP() << "the system does not let threads choose their CPU";
  EXPECT_TRUE(std::ranges::includes(cpus, seen)) << testing::PrintToString(seen);
}

TEST(Engine, StatisticsCountWhatCallsHaveDone) {
  EngineCase engine({.tokens = 3, .top_k = 2});
  engine.batch().ids = {0, 2, 2, -1, 2, 0};
  const Call call(TwoThreads(), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  const Layer::Statistics before = engine.layer()->statistics();
  for (int i = 0; i < 5; ++i) call.Execute(engine.Tensors(output));
  engine.batch().ids[3] = 77;
  EXPECT_THROW(call.Execute(engine.Tensors(output)), std::out_of_range);
  const Layer::Statistics after = engine.layer()->statistics();
  EXPECT_EQ(after.calls - before.calls, 5);
  EXPECT_GT(after.seconds, before.seconds);
  EXPECT_EQ(after.bytes_read - before.bytes_read,
            5 * 2 * static_cast<int64_t>(engine.layer()->nbytes()) / 4);
  std::vector<int64_t> tokens;
  for (size_t e = 0; e < 4; ++e) {
    tokens.push_back(after.expert_tokens[e] - before.expert_tokens[e]);
  }
  EXPECT_EQ(tokens, (std::vector<int64_t>{10, 0, 15, 0}));
}

}  // namespace
}  // namespace cpumoe
