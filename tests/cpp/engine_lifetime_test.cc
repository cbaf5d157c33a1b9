// The engine's handles in every order of destruction, closing and forking.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpp/engine_test_util.h"
#include "cpp/forked_child.h"
#include "engine/pending_call.h"

namespace cpumoe {
namespace {

using Bytes = std::vector<std::byte>;

constexpr char kClosed[] = "this Runtime is closed; create a new one";

// Occupies a runtime's driver until Open().
class HeldDriver {
 public:
  explicit HeldDriver(Runtime& runtime)
      : completion_(runtime.Submit([open = gate_.get_future().share()](Node&) { open.wait(); })) {}
  void Open() { gate_.set_value(); }

 private:
  std::promise<void> gate_;
  std::shared_ptr<Completion> completion_;
};

TEST(EngineLifetime, ACallOutlivesItsRuntime) {
  const EngineCase engine;
  auto runtime = Runtime::Create({.node = {.threads = 2}});
  Call call(runtime, engine.layer(), engine.Options());
  Bytes output = engine.Output();
  call.Bind(engine.Tensors(output));
  runtime->Close();
  runtime.reset();
  EXPECT_FALSE(call.Run());
  EXPECT_EQ(MessageOf(call.TakeError()), kClosed);
  EXPECT_EQ(MessageOf([&] { call.Execute({}); }), kClosed);
  EXPECT_EQ(MessageOf([&] { call.Submit({}); }), kClosed);
}

TEST(EngineLifetime, AHandleThatIsNotClosedKeepsItsRuntimeRunning) {
  const EngineCase engine;
  Call call(Runtime::Create({.node = {.threads = 2}}), engine.layer(), engine.Options());
  Bytes output = engine.Output();
  call.Execute(engine.Tensors(output));
  EXPECT_EQ(output, engine.expected());
}

// Everything that a submitted call needs is dropped before the call begins, so that the driver
// destroys the layer and its own runtime.
TEST(EngineLifetime, TheDriverDropsTheLastHandles) {
  for (const bool copy_inputs : {false, true}) {
    std::optional<EngineCase> engine(std::in_place);
    auto runtime = Runtime::Create({.node = {.threads = 2}});
    std::optional<HeldDriver> held(std::in_place, *runtime);
    std::optional<Call> call(std::in_place, runtime, engine->layer(), engine->Options());
    const Bytes expected = engine->expected();
    Bytes output = engine->Output();
    std::shared_ptr<Completion> last;
    for (int i = 0; i < 5; ++i) last = call->Submit(engine->Tensors(output), copy_inputs);
    const std::weak_ptr<Runtime> watched_runtime = runtime;
    const std::weak_ptr<Layer> watched_layer = engine->layer();
    call.reset();
    runtime.reset();
    if (copy_inputs) engine.reset();  // which owns the inputs
    EXPECT_FALSE(watched_runtime.expired());
    EXPECT_FALSE(watched_layer.expired());
    held->Open();
    last->Wait();
    EXPECT_TRUE(watched_runtime.expired());
    EXPECT_EQ(watched_layer.expired(), copy_inputs);
    EXPECT_EQ(output, expected);
  }
}

TEST(EngineLifetime, ClosingRunsWhatIsQueued) {
  const EngineCase engine;
  const auto runtime = Runtime::Create({.node = {.threads = 2}});
  std::vector<Bytes> outputs(20, engine.Output());
  std::vector<std::shared_ptr<Completion>> completions;
  {
    HeldDriver held(*runtime);
    const Call call(runtime, engine.layer(), engine.Options());
    for (Bytes& output : outputs) completions.push_back(call.Submit(engine.Tensors(output)));
    held.Open();
  }
  std::vector<std::thread> closers;
  for (int i = 0; i < 3; ++i) {
    closers.emplace_back([&] {
      runtime->Close();
      EXPECT_TRUE(completions.back()->Done());
    });
  }
  for (std::thread& closer : closers) closer.join();
  for (const auto& completion : completions) completion->Wait();
  for (const Bytes& output : outputs) EXPECT_EQ(output, engine.expected());
  runtime->Close();
}

TEST(EngineLifetime, WhatWasAcceptedWhileClosingIsComputed) {
  const EngineCase engine;
  for (const bool callers_compute : {true, false}) {
    const auto runtime =
        Runtime::Create({.node = {.threads = 2}, .callers_compute = callers_compute});
    const Call call(runtime, engine.layer(), engine.Options());
    std::vector<Bytes> outputs(4, engine.Output());
    std::vector<Call::Tensors> tensors;
    for (Bytes& output : outputs) tensors.push_back(engine.Tensors(output));
    std::atomic<int> made{0};
    std::vector<std::thread> callers;
    for (size_t t = 0; t < outputs.size(); ++t) {
      callers.emplace_back([&, t] {
        const std::string message = MessageOf([&] {
          for (;;) {
            if (t % 2 == 0) {
              call.Submit(tensors[t])->Wait();
            } else {
              call.Execute(tensors[t]);
            }
            ++made;
          }
        });
        EXPECT_EQ(message, kClosed);
      });
    }
    while (made < 40) std::this_thread::yield();
    runtime->Close();
    for (std::thread& caller : callers) caller.join();
    for (const Bytes& output : outputs) {
      EXPECT_TRUE(output == engine.expected() || output == engine.Output());
    }
  }
}

TEST(EngineLifetime, APendingCallIsWaitedFor) {
  const EngineCase engine;
  const auto runtime = Runtime::Create({.node = {.threads = 2}});
  const Call call(runtime, engine.layer(), engine.Options());
  Bytes first = engine.Output(), second = first, third = first;
  {
    PendingCall pending;
    pending.WaitQuietly();
    HeldDriver held(*runtime);
    pending = PendingCall(call.Submit(engine.Tensors(first)));
    EXPECT_FALSE(pending.Done());
    EXPECT_FALSE(pending.WaitFor(0.0));
    EXPECT_FALSE(pending.WaitFor(-1.0));
    EXPECT_FALSE(pending.WaitFor(1e-9));
    held.Open();
    pending = PendingCall(call.Submit(engine.Tensors(second)));
    EXPECT_EQ(first, engine.expected());
    EXPECT_TRUE(pending.WaitFor(1e300));
    PendingCall moved = std::move(pending);
    moved.Wait();
    pending = PendingCall(call.Submit(engine.Tensors(third)));
  }
  EXPECT_EQ(second, engine.expected());
  EXPECT_EQ(third, engine.expected());
}

constexpr char kForked[] =
    "Runtime: its threads belong to the parent process and do not exist after fork(); create a new "
    "Runtime in the child process";

// Returns which use of the parent's handles in a forked child was wrong, 0 for none.
int UseInChild(std::shared_ptr<Runtime> runtime, Call* call) {
  if (MessageOf([&] { call->Execute({}); }) != kForked) return 1;
  if (MessageOf([&] { call->Submit({}); }) != kForked) return 2;
  if (call->Run()) return 3;
  if (MessageOf(call->TakeError()) != kForked) return 4;
  runtime->Close();
  delete call;
  runtime.reset();
  return 0;
}

// A runtime, and a call of it that a child can destroy.
struct Forkable {
  Forkable() : runtime(Runtime::Create({.node = {.threads = 2}})) {}
  ~Forkable() { delete call; }

  // The result of UseInChild in a child that is forked now.
  int UseAfterFork() {
    return ResultInChild([&] { return UseInChild(std::move(runtime), call); });
  }

  const EngineCase engine;
  std::shared_ptr<Runtime> runtime;
  Call* call = new Call(runtime, engine.layer(), engine.Options());
  Bytes output = engine.Output();
};

TEST(EngineLifetime, ForkBeforeAnyCall) { EXPECT_EQ(Forkable().UseAfterFork(), 0); }

TEST(EngineLifetime, ForkBetweenCalls) {
  Forkable f;
  f.call->Execute(f.engine.Tensors(f.output));
  f.call->Submit(f.engine.Tensors(f.output))->Wait();
  EXPECT_EQ(f.UseAfterFork(), 0);
  f.call->Execute(f.engine.Tensors(f.output));
  EXPECT_EQ(f.output, f.engine.expected());
}

TEST(EngineLifetime, ForkWithAQueuedCall) {
  Forkable f;
  HeldDriver held(*f.runtime);
  PendingCall pending(f.call->Submit(f.engine.Tensors(f.output)));
  EXPECT_EQ(f.UseAfterFork(), 0);
  EXPECT_EQ(ResultInChild([&] {
              if (pending.Done()) return 1;
              pending.WaitQuietly();
              return MessageOf([&] { pending.Wait(); }).starts_with("executor: its threads") ? 0
                                                                                             : 2;
            }),
            0);
  held.Open();
  pending.Wait();
  EXPECT_EQ(f.output, f.engine.expected());
}

// The child has a copy of the mutex that the parent's other thread has locked.
TEST(EngineLifetime, ForkWhileAnotherThreadIsInACall) {
  Forkable f;
  std::promise<void> inside, leave;
  std::thread caller([&] {
    f.runtime->Execute([&](Node&) {
      inside.set_value();
      leave.get_future().wait();
    });
  });
  inside.get_future().wait();
  EXPECT_EQ(f.UseAfterFork(), 0);
  leave.set_value();
  caller.join();
}

TEST(EngineLifetime, ForkWhileAnotherThreadCloses) {
  Forkable f;
  std::optional<HeldDriver> held(std::in_place, *f.runtime);
  std::thread closer([&] { f.runtime->Close(); });
  while (MessageOf([&] { f.runtime->Submit([](Node&) {}); }) != kClosed) std::this_thread::yield();
  EXPECT_EQ(f.UseAfterFork(), 0);
  held->Open();
  closer.join();
}

TEST(EngineLifetime, ForkAfterClosing) {
  Forkable f;
  f.runtime->Close();
  EXPECT_EQ(f.UseAfterFork(), 0);
}

TEST(EngineLifetime, AChildMakesItsOwnRuntimeForTheParentsLayer) {
  Forkable f;
  f.call->Execute(f.engine.Tensors(f.output));
  EXPECT_EQ(ResultInChild([&] {
              // ThreadSanitizer ends a child that starts threads.
              const Call call(Runtime::Create({}), f.engine.layer(), f.engine.Options());
              Bytes output = f.engine.Output();
              call.Execute(f.engine.Tensors(output));
              return output == f.engine.expected() ? 0 : 1;
            }),
            0);
}

TEST(EngineLifetime, AChildDoesNotChangeTheParentsLayer) {
  Forkable f;
  EXPECT_EQ(ResultInChild([&] {
              Layer& layer = *f.engine.layer();
              constexpr char kRefused[] = "Layer: a forked process may use its parent's experts";
              for (const auto& change : std::vector<std::function<void()>>{
                       [&] { layer.Evict(0); }, [&] { layer.SetMask(nullptr); },
                       [&] { layer.EvictMasked(); }, [&] { layer.RequireOwnProcess(); }}) {
                if (!MessageOf(change).starts_with(kRefused)) return 1;
              }
              const auto runtime = Runtime::Create({});
              return MessageOf([&] { layer.Pack(*runtime, 0, {}); }).starts_with(kRefused) ? 0 : 2;
            }),
            0);
  f.call->Execute(f.engine.Tensors(f.output));
  EXPECT_EQ(f.output, f.engine.expected());
}

}  // namespace
}  // namespace cpumoe
